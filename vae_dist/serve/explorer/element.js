// element("li", { className: "x", "aria-current": true }, "text", child): properties where there are such, else attributes.

export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

export const shown = (text) => text || "(an empty text)";

export function pairs(entries) {
  const rows = entries.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)));
  return element("dl", { className: "pairs" }, ...rows);
}
