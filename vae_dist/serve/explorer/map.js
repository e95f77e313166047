// Validation texts on a plane through the latent space. A place on it is a latent, and its text is asked for.

import { ask } from "./api.js";
import { element, shown } from "./element.js";
import { pack, unpack } from "./latent.js";
import { liveText } from "./live.js";
import { grid, plot } from "./plot.js";
import { recording } from "./recording.js";

const HOW = { tokens: "Length, tokens", kl: "KL, nats", source: "Data set" };
const COLUMNS = 24, ROWS = 16; // of the places whose texts a recording has
const SOURCES = 6; // colours that the style sheet has
const START = "The map is of validation texts of a data set, vae-dist serve MODEL --texts DATA, and of models with one latent a text.";

export async function map({ values, signal, remember, report, link }) {
  const found = await ask("v1/map", null, signal);
  const { points, shares } = found;
  if (!points.length) return [element("p", { className: "chosen" }, "No texts to draw"), element("p", { className: "note" }, START)];
  const live = liveText(signal, report), nearby = element("p", { className: "note nearby" });
  // A recording has the texts of some places only: who goes anywhere goes to the nearest.
  const places = recording && grid(points, COLUMNS, ROWS);
  let z = values.z ? unpack(values.z) : place(found, places ? closest(places, [0, 0]).at : [0, 0]);
  let colour = Object.hasOwn(HOW, values.colour ?? "") ? values.colour : "tokens";
  if (z.length !== found.centre.length) throw new Error("The latent in the address is another model's. Start from the map.");

  const keep = () => remember({ colour, z: pack(z) });
  const stand = (at, point) => {
    nearby.textContent = where(points, at, point);
    const input = (point ?? closest(points, at)).text;
    if (!recording) nearby.append(element("a", { href: link("wander", { input, z: pack(z) }) }, "Wander from here"));
    drawn.mark(at);
  };
  const drawn = plot(points, (at, point) => {
    const to = places ? closest(places, at) : (point ?? { at });
    z = to.latent ?? place(found, to.at);
    stand(to.at, places ? null : point);
    live.later(z, keep);
  });
  const legend = element("div", { className: "legend" });
  const paint = () => legend.replaceChildren(...shade(points, colour, drawn.dots));
  const choose = (chosen) => {
    colour = chosen;
    paint();
    keep();
  };
  stand(project(found, z), points.find((point) => pack(point.latent) === pack(z)));
  paint();
  await live.decode(z);
  return [live.node, nearby, choice(points, colour, choose), legend, drawn.node, explanation(points, shares, places)];
}

function where(points, at, point) {
  const { text, tokens, kl } = point ?? closest(points, at);
  return `${point ? "What the model makes of" : "Between the texts. The nearest on the map"}: ${text} (${tokens} tokens, KL ${kl.toFixed(1)} nats). `;
}

function explanation(points, shares, places) {
  const [first, second] = shares.map((share) => `${(100 * share).toFixed(0)} %`);
  const text = `${points.length.toLocaleString("en")} validation texts at their posterior means, on the plane of their largest variance: the axes `
    + `hold ${first} and ${second} of it. Between the texts everything else is at its mean. Click, or use the arrow keys (with Shift in larger steps).`;
  return element("p", { className: "note" }, places ? `${text} This recording has the texts of ${places.length} places.` : text);
}

// The latents of a recording's places.
export const recordedLatents = (found) => grid(found.points, COLUMNS, ROWS).map(({ at }) => place(found, at));

// In float32, as the address has it.
function place({ centre, axes, on_sphere: onSphere }, [x, y]) {
  const z = centre.map((value, d) => value + x * axes[0][d] + y * axes[1][d]);
  const length = (onSphere && Math.hypot(...z)) || 1;
  return z.map((value) => Math.fround(value / length));
}

function project({ centre, axes }, z) {
  return axes.map((axis) => axis.reduce((sum, value, d) => sum + value * (z[d] - centre[d]), 0));
}

function closest(places, [x, y]) {
  const far = ({ at }) => Math.hypot(at[0] - x, at[1] - y);
  return places.reduce((best, one) => (far(one) < far(best) ? one : best));
}

function choice(points, colour, choose) {
  const offered = Object.keys(HOW).filter((name) => name !== "source" || new Set(points.map((point) => point.source)).size > 1);
  const radios = offered.map((name) => {
    const radio = element("input", { type: "radio", name: "colour", value: name, checked: name === colour });
    radio.addEventListener("change", () => choose(name));
    return element("label", {}, radio, ` ${HOW[name]}`);
  });
  return element("fieldset", {}, element("legend", {}, "Colour"), ...radios);
}

// Colours the dots, and returns the legend.
function shade(points, colour, dots) {
  if (colour === "source") {
    const names = [...new Set(points.map((point) => point.source))];
    const tint = (name) => `var(--source-${names.indexOf(name) % SOURCES})`;
    dots.forEach((dot, i) => dot.style.setProperty("--tint", tint(points[i].source)));
    return names.map((name) => {
      const key = element("span", { className: "key" }, name);
      key.style.setProperty("--tint", tint(name));
      return key;
    });
  }
  // A few extreme texts do not take all the colours.
  const sorted = points.map((point) => point[colour]).sort((a, b) => a - b);
  const low = sorted[Math.floor(0.02 * (sorted.length - 1))], high = sorted[Math.ceil(0.98 * (sorted.length - 1))];
  dots.forEach((dot, i) => {
    const share = Math.min(1, Math.max(0, (points[i][colour] - low) / (high - low || 1)));
    dot.style.setProperty("--tint", `color-mix(in oklch, var(--low), var(--high) ${Math.round(100 * share)}%)`);
  });
  const written = (value) => (colour === "kl" ? value.toFixed(1) : String(value));
  return [written(low), element("span", { className: "ramp", ariaHidden: "true" }), written(high)];
}
