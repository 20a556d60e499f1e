// Show the step and the value under the pointer; the values are those of the table below the charts.
for (const figure of document.querySelectorAll("figure[data-table]")) {
  const table = document.getElementById(figure.dataset.table);
  const rows = table ? [...table.tBodies[0].rows] : [];
  const column = Number(figure.dataset.column);
  const known = rows.filter((row) => row.cells[column].textContent !== "");
  const svg = figure.querySelector("svg[role=img]");
  const cursor = figure.querySelector(".cursor");
  const read = figure.querySelector(".read");
  const step = (row) => Number(row.cells[0].textContent.replaceAll(",", ""));
  if (known.length < 2) continue;
  const first = step(known[0]);
  const last = step(known[known.length - 1]);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const wanted = first + ((event.clientX - box.left) / box.width) * (last - first);
    const nearest = known.reduce((a, b) => (Math.abs(step(b) - wanted) < Math.abs(step(a) - wanted) ? b : a));
    const x = ((step(nearest) - first) / (last - first)) * svg.viewBox.baseVal.width;
    cursor.setAttribute("d", `M${x} 0V${svg.viewBox.baseVal.height}`);
    read.textContent = `step ${nearest.cells[0].textContent}: ${nearest.cells[column].textContent}`;
  });
  svg.addEventListener("pointerleave", () => {
    cursor.setAttribute("d", "");
    read.textContent = "";
  });
}
// On paper every fold is open. The style does that too; not every browser can show what is in a closed one.
const opened = [];
addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll("details:not([open])")) {
    fold.open = true;
    opened.push(fold);
  }
});
addEventListener("afterprint", () => {
  for (const fold of opened.splice(0)) fold.open = false;
});
