// Points on a plane as SVG: hover shows a text, a click or the arrow keys choose a place.

import { element, shown } from "./element.js";

const WIDTH = 1000, WIDE = 640, MARGIN = 40;
const HEIGHT = matchMedia("(max-width: 46rem)").matches ? WIDTH : WIDE;
const HOVER_PX = 16, CLICK_PX = 7;
const STEP = WIDTH / 40, LARGE = 5;
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function svg(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// `choose(at, point)`: a place in the units of the points, and the point there, if one is; `mark(at)` shows it.
export function plot(points, choose) {
  const scale = scaling(points, HEIGHT), spots = points.map((point) => scale.to(point.at));
  // A line without length has the width of its stroke on every screen.
  const dots = spots.map(([x, y]) => svg("path", { class: "dot", d: `M${x.toFixed(1)} ${y.toFixed(1)}h0` }));
  const hairs = svg("path", { class: "hairs" }), stand = svg("path", { class: "stand" });
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, tabindex: 0, role: "application", "aria-label": "Map. Arrow keys move; the text there is written above." },
    hairs, ...dots, stand);
  const tip = element("div", { className: "tip", hidden: true });
  let cursor = [WIDTH / 2, HEIGHT / 2];

  const mark = (at) => {
    cursor = scale.to(at);
    const [x, y] = cursor.map((value) => value.toFixed(1));
    hairs.setAttribute("d", `M0 ${y}H${WIDTH}M${x} 0V${HEIGHT}`);
    stand.setAttribute("d", `M${x} ${y}h0`);
  };
  const step = ([x, y], point) => choose(point?.at ?? scale.from([clamp(x, WIDTH), clamp(y, HEIGHT)]), point);
  const pointed = (event, reach) => {
    const box = picture.getBoundingClientRect(), pixel = WIDTH / box.width;
    const spot = [(event.clientX - box.left) * pixel, (event.clientY - box.top) * pixel];
    const near = nearest(spots, spot, reach * pixel);
    return { spot, near, box };
  };
  picture.addEventListener("click", (event) => {
    const { spot, near } = pointed(event, CLICK_PX);
    step(near === null ? spot : spots[near], near === null ? null : points[near]);
  });
  picture.addEventListener("keydown", (event) => {
    const way = ARROWS[event.key];
    if (!way || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    step(cursor.map((value, k) => value + way[k] * STEP * (event.shiftKey ? LARGE : 1)), null);
  });
  const hover = (near, width) => {
    picture.querySelector(".dot.near")?.classList.remove("near");
    tip.hidden = near === null;
    if (near === null) return;
    dots[near].classList.add("near");
    tip.textContent = shown(points[near].text);
    const [x, y] = spots[near].map((value) => (value * width) / WIDTH);
    tip.classList.toggle("left", x + tip.offsetWidth > width);
    tip.style.setProperty("left", `${x}px`);
    tip.style.setProperty("top", `${y}px`);
  };
  picture.addEventListener("pointermove", (event) => {
    const { near, box } = pointed(event, HOVER_PX);
    hover(near, box.width);
  });
  picture.addEventListener("pointerleave", () => hover(null));
  return { node: element("div", { className: "plot" }, picture, tip), dots, mark };
}

// Places all over the plot, the same for all screens.
export function grid(points, columns, rows) {
  const scale = scaling(points, WIDE), cell = [WIDTH / columns, WIDE / rows];
  const number = Array.from({ length: columns * rows }, (_, i) => [i % columns, Math.floor(i / columns)]);
  return number.map(([column, row]) => ({ at: scale.from([(column + 0.5) * cell[0], (row + 0.5) * cell[1]]) }));
}

// One scale for both axes, so that distances are alike; the second axis points up.
function scaling(points, height) {
  const middle = [0, 1].map((k) => (least(points, k) + most(points, k)) / 2);
  const spread = [0, 1].map((k) => most(points, k) - least(points, k));
  const unit = Math.min((WIDTH - 2 * MARGIN) / (spread[0] || 1), (height - 2 * MARGIN) / (spread[1] || 1));
  return {
    to: ([x, y]) => [WIDTH / 2 + (x - middle[0]) * unit, height / 2 - (y - middle[1]) * unit],
    from: ([x, y]) => [middle[0] + (x - WIDTH / 2) / unit, middle[1] - (y - height / 2) / unit],
  };
}

const clamp = (value, most) => Math.min(most, Math.max(0, value));
const least = (points, k) => points.reduce((value, { at }) => Math.min(value, at[k]), Infinity);
const most = (points, k) => points.reduce((value, { at }) => Math.max(value, at[k]), -Infinity);

function nearest(spots, [x, y], reach) {
  let found = null, best = reach;
  spots.forEach((spot, i) => {
    const far = Math.hypot(spot[0] - x, spot[1] - y);
    if (far <= best) [found, best] = [i, far];
  });
  return found;
}
