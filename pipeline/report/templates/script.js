"use strict";
(() => {
  const root = document.documentElement;
  const make = (name, given = {}, ...children) => {
    const element = Object.assign(document.createElement(name), given);
    element.append(...children);
    return element;
  };

  // Light or dark as the reader's device has it, until it is chosen here
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const wanted = new URLSearchParams(location.search).get("theme");
  const show = (theme) => root.setAttribute("data-theme", theme);
  show(wanted === "dark" || wanted === "light" ? wanted : dark.matches ? "dark" : "light");
  dark.addEventListener("change", (event) => show(event.matches ? "dark" : "light"));
  const theme = document.getElementById("theme");
  theme.hidden = false;
  theme.addEventListener("click", () => show(root.dataset.theme === "dark" ? "light" : "dark"));

  // A link to a folded part opens it
  const unfold = (hash) => {
    const found = hash.length > 1 && document.getElementById(decodeURIComponent(hash.slice(1)));
    const part = found && found.closest("details");
    if (!part) return;
    part.open = true;
    part.scrollIntoView();
  };
  document.addEventListener("click", (event) => {
    const link = event.target.closest && event.target.closest('a[href^="#"]');
    if (link) setTimeout(() => unfold(link.hash));
  });
  addEventListener("hashchange", () => unfold(location.hash));
  unfold(location.hash);

  // Commands can be copied
  document.querySelectorAll(".copy").forEach((code) => {
    const text = code.textContent;
    const button = make("button", { type: "button", textContent: "copy" });
    const chosen = () => getSelection().selectAllChildren(code.firstChild.parentNode);
    button.addEventListener("click", () => {
      Promise.resolve(navigator.clipboard && navigator.clipboard.writeText(text)).then(() => { button.textContent = navigator.clipboard ? "copied" : "copy"; }, chosen);
      if (!navigator.clipboard) chosen();
    });
    code.append(button);
  });

  // Tooltips
  const tip = document.getElementById("tip");
  const place = (x, y) => {
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(6, Math.min(x + 14, innerWidth - box.width - 6)) + "px";
    tip.style.top = (y + box.height + 24 > innerHeight ? Math.max(6, y - box.height - 12) : y + 16) + "px";
    tip.style.visibility = "visible";
  };
  const hide = () => { tip.style.visibility = "hidden"; };
  const say = (element, x, y) => { tip.textContent = element.dataset.tip; place(x, y); };
  const near = (element) => { const box = element.getBoundingClientRect(); say(element, box.right, box.top); };
  const above = (event) => event.target.closest && event.target.closest(".tip");
  document.addEventListener("pointerover", (event) => { if (above(event)) say(above(event), event.clientX, event.clientY); });
  // A finger leaves where it touched: what it showed stays until the next touch.
  document.addEventListener("pointerout", (event) => { if (above(event) && event.pointerType !== "touch") hide(); });
  document.addEventListener("pointerdown", (event) => {
    if (event.pointerType !== "touch" || above(event)) return;
    hide();
    const chart = event.target.closest && event.target.closest(".chart");
    let best = null, reach = 24;
    for (const element of chart ? chart.querySelectorAll(".tip") : []) {
      const box = element.getBoundingClientRect();
      const away = Math.hypot(event.clientX - (box.left + box.right) / 2, event.clientY - (box.top + box.bottom) / 2);
      if (away < reach) { reach = away; best = element; }
    }
    if (best) say(best, event.clientX, event.clientY);
  });
  document.addEventListener("focusin", (event) => { if (event.target.matches(".tip:focus-visible")) near(event.target); });
  document.addEventListener("focusout", hide);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  addEventListener("scroll", hide, { passive: true });

  // A chart is one stop for the keyboard; arrow keys go from mark to mark
  const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  document.querySelectorAll(".tip").forEach((element) => {
    element.setAttribute("role", "img");
    element.setAttribute("aria-label", element.dataset.tip);
  });
  document.querySelectorAll(".chart").forEach((chart) => {
    const marks = [...chart.querySelectorAll(".tip")];
    marks.forEach((mark, number) => mark.setAttribute("tabindex", number ? "-1" : "0"));
    chart.addEventListener("keydown", (event) => {
      const next = marks[marks.indexOf(event.target) + STEPS[event.key]];
      if (!next) return;
      event.preventDefault();
      event.target.setAttribute("tabindex", "-1");
      next.setAttribute("tabindex", "0");
      next.focus();
      near(next);
    });
  });

  // What is known of the images, in the order of their picture; those of the map come first
  const data = document.getElementById("images");
  const images = data && JSON.parse(data.textContent);
  const known = new Map(images ? images.paths.map((path, number) => [path, number]) : []);
  const thumb = (number, side) => {
    const { columns } = images;
    const element = make("div", { className: "thumb" });
    element.style.backgroundImage = `url(${images.sheet})`;
    element.style.backgroundSize = `${columns * 100}% auto`;
    element.style.backgroundPosition = `${columns > 1 ? 100 * (number % columns) / (columns - 1) : 0}% ${lines > 1 ? 100 * Math.floor(number / columns) / (lines - 1) : 0}%`;
    if (side) { element.style.width = `${side}px`; element.style.height = `${side}px`; }
    return element;
  };
  const lines = images ? Math.ceil(images.paths.length / images.columns) : 0;
  const wrong = (number) => images.right[number] === 0;
  const answer = (number) => images.said[number] && images.said[number] + (images.sure[number] ? ` · ${images.sure[number]}\u00a0%` : "");
  const caption = (number) => {
    const lines = [make("b", { textContent: images.labels[number] })];
    if (answer(number)) lines.push(make("br"), make("span", { className: wrong(number) ? "wrong" : "", textContent: `said ${answer(number)}` }));
    lines.push(make("br"), make("span", { textContent: images.splits[number] }));
    return lines;
  };
  const pressable = (element, number) => {
    element.setAttribute("role", "button");
    element.setAttribute("aria-label", `${images.paths[number]}, ${images.labels[number]}: show its neighbours`);
    element.addEventListener("click", () => open(number));
    element.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      open(number);
    });
  };
  const small = (number) => {
    const frame = make("div", { className: "frame", tabIndex: 0 }, thumb(number));
    pressable(frame, number);
    return make("figure", {}, frame, make("figcaption", {}, ...caption(number)));
  };

  // An image that is pressed shows its nearest neighbours, and these theirs
  const dialog = document.getElementById("image");
  const large = (number) => {
    const shown = [...document.querySelectorAll(".frame[data-path] > img")].find((image) => image.parentNode.dataset.path === images.paths[number]);
    return shown ? make("img", { src: shown.src, alt: "" }) : thumb(number, 112);
  };
  const open = (number) => {
    hide();
    const close = make("button", { className: "close", textContent: "×" });
    close.setAttribute("aria-label", "Close");
    close.addEventListener("click", () => dialog.close());
    const few = images.paths.length < images.total ? ` of the ${images.paths.length} images in this page` : "";
    dialog.replaceChildren(
      close,
      make("div", { className: "about" }, large(number), make("p", {}, ...caption(number), make("br"), make("span", { className: "quiet", textContent: images.paths[number] }))),
      make("h3", { textContent: `Nearest to it${few}` }),
      make("div", { className: "gallery small" }, ...images.near[number].map(small)),
    );
    if (!dialog.open) dialog.showModal();
    close.focus();
  };
  if (dialog) dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });

  // Galleries can be filtered by what their images differ in
  const FACETS = {
    Class: (number) => images.codes[number].map((code) => images.classes[code]),
    Split: (number) => [images.splits[number]],
    Answer: (number) => images.right[number] < 0 ? [] : [wrong(number) ? "wrong" : "right"],
    Mistake: (number) => wrong(number) ? [`${images.labels[number]} → ${images.said[number]}`] : [],
  };
  const facets = (numbers, changed) => {
    const chosen = {}, bar = make("div", { className: "facets" });
    const fits = (number) => Object.entries(chosen).every(([name, value]) => !value || FACETS[name](number).includes(value));
    const count = make("span", { className: "quiet" });
    count.setAttribute("role", "status");
    const update = () => {
      const left = numbers.filter(fits);
      count.textContent = `${left.length} of ${numbers.length}`;
      changed(left);
    };
    for (const [name, values] of Object.entries(FACETS)) {
      const counts = new Map();
      numbers.forEach((number) => values(number).forEach((value) => counts.set(value, (counts.get(value) || 0) + 1)));
      if (counts.size < 2) continue;
      const select = make("select", {}, make("option", { value: "", textContent: `${name}: any` }));
      select.setAttribute("aria-label", name);
      select.append(...[...counts].sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1)).map(([value, times]) => make("option", { value, textContent: `${value} (${times})` })));
      select.addEventListener("change", () => { chosen[name] = select.value; update(); });
      bar.append(select);
    }
    bar.append(count);
    update();
    return bar;
  };
  const FEW = 8, PAGE = 48;
  document.querySelectorAll(".frame[data-path]").forEach((frame) => {
    if (known.has(frame.dataset.path)) pressable(frame, known.get(frame.dataset.path));
  });
  document.querySelectorAll(".gallery, .pairs").forEach((gallery) => {
    const figures = new Map([...gallery.children].map((figure) => [figure, [...figure.querySelectorAll("[data-path]")].map((frame) => known.get(frame.dataset.path)).find((number) => number !== undefined)]));
    if (!images || figures.size < FEW || [...figures.values()].includes(undefined)) return;
    const numbers = [...figures.values()];
    gallery.before(facets(numbers, (left) => {
      const shown = new Set(left);
      figures.forEach((number, figure) => { figure.hidden = !shown.has(number); });
    }));
  });
  const browse = document.getElementById("browse");
  if (browse && images) {
    const more = make("button", { className: "show-more", type: "button", textContent: "Show more" });
    let left = [];
    const add = () => {
      browse.append(...left.splice(0, PAGE).map(small));
      more.hidden = !left.length;
    };
    more.addEventListener("click", add);
    browse.before(facets(images.paths.map((_, number) => number), (found) => { left = [...found]; browse.replaceChildren(); add(); }));
    browse.after(more);
  }

  // The map: the nearest dot within reach shows its image; arrow keys go through the dots
  const svg = document.querySelector('[data-chart="map"]');
  if (images && svg) {
    const dots = [...svg.querySelectorAll('[id$="-dots"] use')];
    const spots = dots.map((dot) => [Number(dot.getAttribute("x")), Number(dot.getAttribute("y"))]);
    let chosen = null, lit = null;
    const visible = (number) => chosen === null || images.codes[number].includes(chosen);
    const dim = () => { if (lit) { lit.style.stroke = ""; lit.style.strokeWidth = ""; lit = null; } };
    const nearest = (event) => {
      const matrix = svg.getScreenCTM().inverse();
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix);
      let best = -1, reach = Math.max(9, (event.pointerType === "touch" ? 26 : 16) * matrix.a);
      spots.forEach(([x, y], number) => {
        const distance = Math.hypot(x - at.x, y - at.y);
        if (distance < reach && visible(number)) { reach = distance; best = number; }
      });
      return best;
    };
    const point = (event) => {
      const best = nearest(event);
      if (best < 0) { dim(); hide(); return; }
      mark(best, event.clientX, event.clientY);
    };
    const mark = (best, clientX, clientY) => {
      dim();
      lit = dots[best];
      lit.style.stroke = "var(--ink)"; lit.style.strokeWidth = "1.6px";
      tip.replaceChildren(thumb(best), ...caption(best), make("br"), images.paths[best]);
      place(clientX, clientY);
    };
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("click", (event) => { const best = nearest(event); if (best >= 0) open(best); });
    svg.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") { hide(); dim(); } });
    svg.setAttribute("tabindex", "0");
    svg.addEventListener("blur", dim);
    svg.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && lit) { open(dots.indexOf(lit)); return; }
      const step = STEPS[event.key], shown = dots.map((_, number) => number).filter(visible);
      if (!step || !shown.length) return;
      event.preventDefault();
      const next = shown[(shown.indexOf(dots.indexOf(lit)) + step + shown.length) % shown.length];
      const box = dots[next].getBoundingClientRect();
      mark(next, box.right, box.top);
    });
    document.querySelectorAll("#map-classes button").forEach((button, code) => {
      button.addEventListener("click", () => {
        chosen = chosen === code ? null : code;
        document.querySelectorAll("#map-classes button").forEach((other, number) => other.setAttribute("aria-pressed", String(number === chosen)));
        dots.forEach((dot, number) => { dot.style.opacity = visible(number) ? "" : "0.06"; });
      });
    });
  }

  // Tables sort by the column whose header is pressed; with buttons in its headers no browser repeats them on every sheet
  document.querySelectorAll("table").forEach((table) => {
    const headers = [...table.tHead.rows[0].cells];
    headers.forEach((header, column) => {
      header.tabIndex = 0;
      header.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        header.click();
      });
      header.addEventListener("click", () => {
        const up = header.getAttribute("aria-sort") === "descending";
        headers.forEach((other) => other.removeAttribute("aria-sort"));
        header.setAttribute("aria-sort", up ? "ascending" : "descending");
        const value = (row) => { const cell = row.cells[column]; return cell.dataset.v !== undefined ? Number(cell.dataset.v) : cell.textContent; };
        const rows = [...table.tBodies[0].rows].sort((a, b) => {
          const [x, y] = [value(a), value(b)];
          return (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y))) * (up ? 1 : -1);
        });
        table.tBodies[0].append(...rows);
      });
    });
  });

  // Paper cannot be unfolded
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    folded.forEach((part) => { part.open = true; });
    document.querySelectorAll("img[loading]").forEach((image) => image.removeAttribute("loading"));
  });
  addEventListener("afterprint", () => folded.forEach((part) => { part.open = false; }));
  root.dataset.ready = "yes";
})();
