// The last drawings: settings and a thumbnail. The images themselves come again from their seed.
const NAME = "hypersd.history", MOST = 12, SIDE = 56;

export function recall(stored) {
  try {
    const entries = JSON.parse(stored.get(NAME) ?? "[]");
    return Array.isArray(entries) ? entries : [];
  } catch {
    return [];
  }
}

export async function remember(asked, event, stored) {
  const entry = { ...asked, thumbnail: await thumbnail(event) };
  const same = (other) => ["prompt", "seed", "lora", "scale", "eta", "guidance", "negative", "size"].every((k) => other[k] === entry[k]);
  const others = recall(stored).filter((other) => !same(other));
  stored.set(NAME, JSON.stringify([entry, ...others].slice(0, MOST)));
}

export function forget(stored) {
  stored.set(NAME, "[]");
}

async function thumbnail(event) {
  const image = new Image();
  image.src = `data:image/${event.output_format};base64,${event.b64_json}`;
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = SIDE;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = image.naturalWidth > SIDE;
  const side = Math.min(image.naturalWidth, image.naturalHeight);
  context.drawImage(image, (image.naturalWidth - side) / 2, (image.naturalHeight - side) / 2, side, side, 0, 0, SIDE, SIDE);
  return canvas.toDataURL("image/jpeg", 0.85);
}
