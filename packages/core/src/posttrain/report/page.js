"use strict";
// What the pointer is over: the step nearest to it and every curve's value there.
const tip = document.getElementById("tip");
const nearest = (steps, x) => {
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < x) low = middle + 1; else high = middle;
  }
  return low > 0 && x - steps[low - 1] <= steps[low] - x ? low - 1 : low;
};
const row = (text, color) => {
  const line = document.createElement("div");
  if (color !== undefined) {
    const chip = document.createElement("i");
    chip.className = "chip c" + color;
    line.append(chip);
  }
  line.append(text);
  return line;
};
for (const chart of document.querySelectorAll("svg[data-chart]")) {
  const data = JSON.parse(chart.dataset.chart), cursor = chart.querySelector(".cursor");
  const hide = () => { tip.hidden = true; cursor.style.visibility = "hidden"; };
  chart.addEventListener("pointerleave", hide);
  chart.addEventListener("pointermove", (event) => {
    const place = chart.getBoundingClientRect();
    const across = (event.clientX - place.left) / place.width * chart.viewBox.baseVal.width;
    const share = Math.min(Math.max((across - data.left) / (data.right - data.left), 0), 1);
    const wanted = data.x[0] + share * (data.x[1] - data.x[0]);
    const longest = data.lines.reduce((a, b) => (b.steps.length > a.steps.length ? b : a));
    const step = longest.steps[nearest(longest.steps, wanted)];
    const x = data.left + (step - data.x[0]) / (data.x[1] - data.x[0]) * (data.right - data.left);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.style.visibility = "visible";
    tip.replaceChildren(row("step " + step), ...data.lines.map((line) => {
      const i = nearest(line.steps, step), value = line.values[i];
      const shown = value === null ? "not finite" : String(value);
      const at = line.steps.length > 1 && line.steps[i] !== step ? " (step " + line.steps[i] + ")" : "";
      return row(line.label + ": " + shown + at, line.color);
    }));
    tip.hidden = false;
    const left = event.pageX + 14, most = window.scrollX + document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = Math.max(Math.min(left, most), 4) + "px";
    tip.style.top = event.pageY + 14 + "px";
  });
}
