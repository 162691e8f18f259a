// A request as JSON, as a curl line, and as Python for the official openai client.

/** The body of a request: the seed, eta and guidance always, the rest where it differs from the server's defaults. */
export function bodyOf(asked, steps, sizes) {
  const body = { prompt: asked.prompt, seed: asked.seed, num_inference_steps: steps };
  if (asked.size && asked.size !== sizes[0]) body.size = asked.size;
  if (asked.lora) body.lora = asked.scale === 1 ? asked.lora : { name: asked.lora, scale: asked.scale };
  // null: the LoRA has none to set
  if (asked.eta !== null) body.eta = asked.eta;
  if (asked.guidance !== null) body.guidance_scale = asked.guidance;
  if (asked.negative) body.negative_prompt = asked.negative;
  return body;
}

const shell = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

export function asCurl(body, origin, key) {
  const lines = [
    `curl -sS --fail-with-body ${origin}/v1/images/generations`,
    `  -H 'Content-Type: application/json'`,
    ...(key ? [`  -H "Authorization: Bearer $HYPERSD_API_KEY"`] : []),
    `  -d ${shell(JSON.stringify(body))}`,
    `  -o answer.json`,
  ];
  // sed, not jq: it is on every machine
  const unpack = String.raw`  && sed 's/.*"b64_json":"\([^"]*\).*/\1/' answer.json | base64 -d > image.png || cat answer.json`;
  return [...lines, unpack].join(" \\\n");
}

/** JSON is Python but for true, false and null, of which there are none here. */
function python(value) {
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${python(one)}`).join(", ")}}`;
}

export function asPython(body, origin, key) {
  const { prompt, size, ...extra } = body;
  return `import base64${key ? "\nimport os" : ""}

from openai import OpenAI

client = OpenAI(base_url=${python(`${origin}/v1`)}, api_key=${key ? `os.environ["HYPERSD_API_KEY"]` : `"none"`})
answer = client.images.generate(
    prompt=${python(prompt)},${size ? `\n    size=${python(size)},` : ""}
    extra_body=${python(extra)},
)
with open("image.png", "wb") as file:
    file.write(base64.b64decode(answer.data[0].b64_json))
`;
}
