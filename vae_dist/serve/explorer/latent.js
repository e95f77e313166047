// A latent as text for an address: little-endian float32 in base64 for URLs, so that it comes back exactly.

export function pack(latent) {
  const view = new DataView(new ArrayBuffer(latent.length * 4));
  latent.forEach((value, i) => view.setFloat32(i * 4, value, true));
  const bytes = String.fromCharCode(...new Uint8Array(view.buffer));
  return btoa(bytes).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

export function unpack(text) {
  try {
    const bytes = Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (c) => c.charCodeAt(0));
    if (bytes.length % 4) throw new RangeError("no whole number of values");
    const view = new DataView(bytes.buffer);
    return Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(i * 4, true));
  } catch {
    throw new Error("The address of this page holds a broken latent. Start from a sentence.");
  }
}
