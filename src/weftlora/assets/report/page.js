"use strict";
(() => {
  const specs = JSON.parse(document.getElementById("specs").textContent);
  const options = { renderer: "svg", actions: false, ast: true, tooltip: { theme: "custom" } };
  const draw = ([id, spec]) =>
    vegaEmbed(`#${id}`, spec, options).catch((error) => {
      const place = document.getElementById(id);
      place.textContent = `This chart could not be drawn (${error.message}); its numbers are in the table.`;
      place.classList.add("failed");
    });
  Promise.all(Object.entries(specs).map(draw)).then(() => {
    document.documentElement.dataset.charts = "drawn";
  });
})();
