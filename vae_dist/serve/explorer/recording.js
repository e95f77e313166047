// What the service answered since the page was loaded, and where that was seen. A page that was saved with it (see
// one_page.js) answers from it alone: `recording` is null on a page that has a service.

const block = document.querySelector("#recording");

export const recording = block && JSON.parse(block.textContent);

const answers = recording?.answers ?? {};
let visits = recording?.visits ?? [];

const named = (path, body) => `${path} ${JSON.stringify(body ?? null)}`;

export function keep(path, body, answer) {
  return (answers[named(path, body)] = answer);
}

export function recorded(path, body) {
  const name = named(path, body);
  if (Object.hasOwn(answers, name)) return answers[name];
  throw new Error("This page is a recording and has no answer to that. A service has: vae-dist serve MODEL");
}

// A place that was looked at, in place of the one that the panel moved on from; one that is seen again is there once.
export function visit(panel, address, title, before) {
  visits = [...visits.filter((one) => one.address !== before && one.address !== address), { panel, address, title }];
}

export const visited = (panel) => visits.filter((one) => one.panel === panel);

export function record(model) {
  return { model, at: new Date().toISOString().slice(0, 10), answers, visits };
}
