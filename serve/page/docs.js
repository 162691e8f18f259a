// The OpenAPI document as a page to read.
const make = (tag, text = "", ...children) => {
  const element = document.createElement(tag);
  if (text) element.textContent = text;
  element.append(...children);
  return element;
};

try {
  document.documentElement.dataset.theme = localStorage.getItem("hypersd.theme") || "";
} catch { /* as the system */ }

const spec = await (await fetch(new URL("../openapi.json", import.meta.url))).json();
const resolve = (schema) => (schema?.$ref ? spec.components.schemas[schema.$ref.split("/").pop()] : schema);

function kind(schema) {
  const given = resolve(schema);
  if (given.anyOf) return given.anyOf.filter((one) => one.type !== "null").map(kind).join(" or ") || "null";
  const parts = [given.enum ? given.enum.map((v) => JSON.stringify(v)).join(" | ") : given.const ?? given.type ?? ""];
  if (given.type === "array") parts[0] = `array of ${kind(given.items)}`;
  if (given.type === "object" && given.properties) parts[0] = `{${Object.keys(given.properties).join(", ")}}`;
  if (given.minimum !== undefined || given.maximum !== undefined) parts.push(`${given.minimum ?? ""} to ${given.maximum ?? ""}`);
  if (given.maxLength) parts.push(`at most ${given.maxLength} characters`);
  return parts.join(", ");
}

function fields(schema) {
  const given = resolve(schema), list = make("dl");
  for (const [name, field] of Object.entries(given.properties ?? {})) {
    const type = kind(field);
    if (type === "null") continue; // not on this server
    const detail = make("dd", resolve(field).description ?? field.description ?? "");
    detail.append(make("small", type + (given.required?.includes(name) ? ", required" : "")));
    list.append(make("dt", name), detail);
  }
  return list;
}

function operation(path, verb, one) {
  const title = make("h2", "", make("code", "", Object.assign(make("span", verb.toUpperCase()), { className: "verb" }), path));
  const article = make("article", "", title, make("p", one.description ?? one.summary));
  const body = one.requestBody?.content["application/json"].schema;
  if (body) article.append(make("h3", "Body"), fields(body));
  const good = one.responses["200"]?.content?.["application/json"]?.schema;
  if (resolve(good)?.properties) article.append(make("h3", "Answer"), fields(good));
  const answers = make("dl");
  for (const [code, answer] of Object.entries(one.responses)) answers.append(make("dt", code), make("dd", answer.description));
  article.append(make("h3", "Status codes"), answers);
  return article;
}

for (const [path, verbs] of Object.entries(spec.paths)) {
  for (const [verb, one] of Object.entries(verbs)) document.getElementById("doc").append(operation(path, verb, one));
}
