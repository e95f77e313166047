// The page and a recording as one HTML file that asks nobody: it opens from a disk and from any static host. Scripts and
// styles stand in it, and its content policy allows these alone, by their hashes.

const IMPORT = /^import (\{.*?\}) from "\.\/(.*?)";$/gm;
const EXPORT = /^export (?:async )?(?:function|const) (\w+)/gm;

export async function onePage(record) {
  if (!globalThis.crypto?.subtle) throw new Error("Browsers compute the hashes of a saved page only on https and on localhost. Open the service there.");
  const script = [...(await modules("explorer.js")).values()].join("\n"), style = await read("explorer/explorer.css");
  const policy = `default-src 'none'; script-src ${await hash(script)}; style-src ${await hash(style)}; img-src data:; base-uri 'none'; form-action 'none'`;
  // `<` would let a text end the block, as the end tag would end this script where it is saved.
  const data = JSON.stringify(record).replaceAll("<", "\\u003c");
  const changes = [
    [/<meta charset="utf-8">/, `$&\n  <meta http-equiv="Content-Security-Policy" content="${policy}">`],
    [/<link rel="stylesheet"[^>]*>/, () => `<style>${style}</style>`],
    [/<script type="module"[^>]*><\/script>/, () => `<script type="application/json" id="recording">${data}<\/script>\n<script type="module">${script}<\/script>`],
  ];
  return changes.reduce((page, [what, by]) => page.replace(what, by), await read("./"));
}

async function read(address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error(`${address} of this page cannot be read: ${answer.status}.`);
  return answer.text();
}

// A module and, before it, those it imports, each as a function's result: a page from a disk may not import files.
async function modules(name, found = new Map()) {
  const source = await read(`explorer/${name}`);
  for (const [, , needed] of source.matchAll(IMPORT)) if (!found.has(needed)) await modules(needed, found);
  const names = [...source.matchAll(EXPORT)].map(([, one]) => one);
  const body = source.replace(IMPORT, (_, what, from) => `const ${what} = ${variable(from)};`).replace(/^export /gm, "");
  return found.set(name, `const ${variable(name)} = (() => {\n${body}\nreturn { ${names.join(", ")} };\n})();`);
}

const variable = (name) => `module_${name.replace(".js", "")}`;

async function hash(text) {
  const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(text));
  return `'sha256-${btoa(String.fromCharCode(...new Uint8Array(digest)))}'`;
}
