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
  document.addEventListener("pointerover", (event) => {
    const element = event.target.closest && event.target.closest(".tip");
    if (element) say(element, event.clientX, event.clientY);
  });
  document.addEventListener("pointerout", (event) => { if (event.target.closest && event.target.closest(".tip")) hide(); });
  document.addEventListener("focusin", (event) => {
    if (!event.target.matches(".tip:focus-visible")) return;
    const box = event.target.getBoundingClientRect();
    say(event.target, box.right, box.top);
  });
  document.addEventListener("focusout", hide);
  addEventListener("scroll", hide, { passive: true });

  // The map: the nearest dot within reach shows its image
  const data = document.getElementById("map-data");
  const svg = document.querySelector('[data-chart="map"]');
  if (data && svg) {
    const map = JSON.parse(data.textContent);
    const dots = [...svg.querySelectorAll('[id$="-dots"] use')];
    const spots = dots.map((dot) => [Number(dot.getAttribute("x")), Number(dot.getAttribute("y"))]);
    let chosen = null, lit = null;
    const visible = (number) => chosen === null || map.codes[number] === chosen;
    const point = (event) => {
      const matrix = svg.getScreenCTM().inverse();
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix);
      let best = -1, reach = Math.max(9, 16 * matrix.a);
      spots.forEach(([x, y], number) => {
        const distance = Math.hypot(x - at.x, y - at.y);
        if (distance < reach && visible(number)) { reach = distance; best = number; }
      });
      if (lit) { lit.style.stroke = ""; lit.style.strokeWidth = ""; lit = null; }
      if (best < 0) { hide(); return; }
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
      place(event.clientX, event.clientY);
    };
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("pointerleave", () => { hide(); if (lit) { lit.style.stroke = ""; lit = null; } });
    document.querySelectorAll("#map-classes button").forEach((button, code) => {
      button.addEventListener("click", () => {
        chosen = chosen === code ? null : code;
        document.querySelectorAll("#map-classes button").forEach((other, number) => other.setAttribute("aria-pressed", String(number === chosen)));
        dots.forEach((dot, number) => { dot.style.opacity = visible(number) ? "" : "0.06"; });
      });
    });
  }

  // Tables sort by the column that is clicked
  document.querySelectorAll("table").forEach((table) => {
    table.querySelectorAll("th").forEach((header, column) => header.addEventListener("click", () => {
      const up = header.getAttribute("aria-sort") === "descending";
      table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => { const cell = row.cells[column]; return cell.dataset.v !== undefined ? Number(cell.dataset.v) : cell.textContent; };
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        return (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y))) * (up ? 1 : -1);
      });
      table.tBodies[0].append(...rows);
    }));
  });
  root.dataset.ready = "yes";
})();
