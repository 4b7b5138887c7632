"use strict";
(() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const wanted = new URLSearchParams(location.search).get("theme");
  const show = (theme) => root.setAttribute("data-theme", theme);
  show(wanted === "dark" || wanted === "light" ? wanted : dark.matches ? "dark" : "light");
  dark.addEventListener("change", (event) => show(event.matches ? "dark" : "light"));
  document.getElementById("theme").addEventListener("click", () => show(root.dataset.theme === "dark" ? "light" : "dark"));

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

  // The map: the nearest dot within reach shows its image; arrow keys go through the dots
  const data = document.getElementById("map-data");
  const svg = document.querySelector('[data-chart="map"]');
  if (data && svg) {
    const map = JSON.parse(data.textContent);
    const dots = [...svg.querySelectorAll('[id$="-dots"] use')];
    const spots = dots.map((dot) => [Number(dot.getAttribute("x")), Number(dot.getAttribute("y"))]);
    let chosen = null, lit = null;
    const visible = (number) => chosen === null || map.codes[number] === chosen;
    const dim = () => { if (lit) { lit.style.stroke = ""; lit.style.strokeWidth = ""; lit = null; } };
    const point = (event) => {
      const matrix = svg.getScreenCTM().inverse();
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix);
      let best = -1, reach = Math.max(9, (event.pointerType === "touch" ? 26 : 16) * matrix.a);
      spots.forEach(([x, y], number) => {
        const distance = Math.hypot(x - at.x, y - at.y);
        if (distance < reach && visible(number)) { reach = distance; best = number; }
      });
      if (best < 0) { dim(); hide(); return; }
      mark(best, event.clientX, event.clientY);
    };
    const mark = (best, clientX, clientY) => {
      dim();
      lit = dots[best];
      lit.style.stroke = "var(--ink)"; lit.style.strokeWidth = "1.6px";
      tip.replaceChildren();
      if (map.sheet) {
        const thumb = document.createElement("div"), side = 112, columns = map.columns;
        thumb.className = "thumb";
        thumb.style.backgroundImage = `url(${map.sheet})`;
        thumb.style.backgroundSize = `${columns * side}px auto`;
        thumb.style.backgroundPosition = `${-(best % columns) * side}px ${-Math.floor(best / columns) * side}px`;
        tip.append(thumb);
      }
      const name = document.createElement("b");
      name.textContent = map.classes[map.codes[best]];
      tip.append(name, document.createElement("br"), `${map.paths[best]} · ${map.splits[best]}`);
      place(clientX, clientY);
    };
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") { hide(); dim(); } });
    svg.setAttribute("tabindex", "0");
    svg.addEventListener("blur", dim);
    svg.addEventListener("keydown", (event) => {
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
