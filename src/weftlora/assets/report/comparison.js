"use strict";
(() => {
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];
  const value = (row, column) => row.cells[column].dataset.order;

  const compare = (a, b) => {
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en") : x - y;
  };

  // What has no number stands last, whichever way; rows of equal value stay in their order.
  const sort = (heading) => {
    const table = heading.closest("table");
    const down = heading.getAttribute("aria-sort") === "ascending";
    const body = table.tBodies[0];
    const held = [...body.rows];
    const known = held.filter((row) => value(row, heading.cellIndex) !== undefined);
    const unknown = held.filter((row) => value(row, heading.cellIndex) === undefined);
    known.sort((a, b) => (down ? -1 : 1) * compare(value(a, heading.cellIndex), value(b, heading.cellIndex)));
    body.append(...known, ...unknown);
    all("th[aria-sort]", table).forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  };
  all(".sortable thead button").forEach((button) => button.addEventListener("click", () => sort(button.closest("th"))));

  const input = document.getElementById("filter");
  const chips = all(".chips button");
  const filter = () => {
    const rows = all(`#${input.getAttribute("aria-controls")} tbody tr`);
    const name = input.value.trim().toLowerCase();
    const kind = chips.find((chip) => chip.getAttribute("aria-pressed") === "true")?.dataset.kind ?? "";
    rows.forEach((row) => {
      row.hidden = !row.dataset.name.toLowerCase().includes(name) || (kind !== "" && row.dataset.kind !== kind);
    });
    document.getElementById("shown").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} shown`;
  };
  input.addEventListener("input", filter);
  chips.forEach((chip) =>
    chip.addEventListener("click", () => {
      chips.forEach((other) => other.setAttribute("aria-pressed", String(other === chip)));
      filter();
    }),
  );

  all(".copy").forEach((button) =>
    button.addEventListener("click", async () => {
      const code = button.parentElement.querySelector("pre");
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code);
        button.textContent = "Selected: copy it";
      }
      setTimeout(() => (button.textContent = "Copy"), 2000);
    }),
  );

  // A link into something folded unfolds it; paper shows everything.
  const unfold = () => document.getElementById(decodeURIComponent(location.hash.slice(1)))?.closest("details")?.setAttribute("open", "");
  addEventListener("hashchange", unfold);
  unfold();
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = all("details:not([open])");
    folded.forEach((details) => details.setAttribute("open", ""));
  });
  addEventListener("afterprint", () => folded.forEach((details) => details.removeAttribute("open")));
})();
