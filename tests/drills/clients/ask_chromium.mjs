// OpenAI's library and fetch() on a page in Chromium, which is not of the gateway's origin. Prints what the page got as one JSON object.
import { chromium } from "playwright-core";

const { BASE_URL, API_KEY, CHROMIUM, GATEWAY, HOME, STRANGER, PAGE, OTHER_PAGE } = process.env;
const told = { preflights: [] };

// What trusts whom is in the home directory of the user.
function browse(home) {
  const args = [`--host-resolver-rules=MAP ${GATEWAY} 127.0.0.1`];
  return chromium.launch({ executablePath: CHROMIUM, args, env: { ...process.env, HOME: home } });
}

async function opened(browser, address) {
  const page = await browser.newPage();
  page.on("pageerror", (error) => console.error(String(error)));
  await page.goto(address);
  return page;
}

// Each runs on the page.
async function withTheLibrary({ baseURL, apiKey }) {
  const { default: OpenAI } = await import("/openai/index.mjs");
  const client = new OpenAI({ baseURL, apiKey, maxRetries: 0, dangerouslyAllowBrowser: true });
  const messages = [{ role: "user", content: "Hello" }];
  const tools = [{ type: "function", function: { name: "weather", parameters: { type: "object", properties: {}, required: [] } } }];
  const told = {};
  told.chat = (await client.chat.completions.create({ model: "generate", messages, max_tokens: 3 })).choices[0].message.content;
  told.stream = "";
  for await (const event of await client.chat.completions.create({ model: "generate", messages, max_tokens: 3, stream: true })) {
    told.stream += event.choices[0].delta.content ?? "";
  }
  told.models = (await client.models.list()).data.map((model) => model.id);
  told.model = (await client.models.retrieve("embed")).id;
  told.tool = (await client.chat.completions.create({ model: "odd", messages, tools })).choices[0].message.tool_calls[0].function.name;
  told.embedding = (await client.embeddings.create({ model: "embed", input: "Hello", encoding_format: "float" })).data[0].embedding.length;
  try {
    await client.chat.completions.create({ model: "none", messages });
  } catch (error) {
    told.refused = [error.status, error.code];
  }
  const begun = Date.now();
  await client.withOptions({ maxRetries: 1 }).chat.completions.create({ model: "odd", messages, user: "full once" });
  told.retried_after = (Date.now() - begun) / 1000;
  return told;
}

async function withFetch({ baseURL, apiKey, user }) {
  const abort = new AbortController();
  const body = JSON.stringify({ model: "odd", messages: [{ role: "user", content: "Hello" }], stream: true, user });
  const headers = { Authorization: `Bearer ${apiKey}`, "Content-Type": "application/json" };
  let answer;
  try {
    answer = await fetch(`${baseURL}/chat/completions`, { method: "POST", headers, body, signal: abort.signal });
  } catch (error) {
    return { kept_back: error.name };
  }
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let aborted = 0;
  while (aborted < 3) {
    aborted += (await reader.read()).value.split("data: ").length - 1;
  }
  abort.abort();
  const readable = [...answer.headers.keys()].sort();
  return { aborted, status: answer.status, readable, end: await reader.read().catch((error) => error.name) };
}

const browser = await browse(HOME);
const page = await opened(browser, PAGE);
const protocol = await page.context().newCDPSession(page);
protocol.on("Network.responseReceived", ({ type, response }) => {
  if (type === "Preflight") told.preflights.push([response.status, new URL(response.url).pathname]);
});
await protocol.send("Network.enable");
const asked = { baseURL: BASE_URL, apiKey: API_KEY };
Object.assign(told, await page.evaluate(withTheLibrary, asked));

const other = await opened(browser, OTHER_PAGE);
const said = [];
other.on("console", (message) => said.push(message.text()));
told.other_origin = (await other.evaluate(withFetch, { ...asked, user: "other origin" })).kept_back;
told.other_origin_because = said.some((text) => text.includes("Access-Control-Allow-Origin"));

const stranger = await browse(STRANGER);
const there = await opened(stranger, PAGE);
there.on("requestfailed", (request) => { told.without_the_authority = request.failure().errorText; });
await there.evaluate(withFetch, { ...asked, user: "without the authority" });
await stranger.close();

told.fetch = await page.evaluate(withFetch, asked);
told.aborted = told.fetch.aborted;
delete told.fetch.aborted;
// Only its page is closed: that the request ends is the work of abort().
await new Promise((resolve) => setTimeout(resolve, 500));
await browser.close();
console.log(JSON.stringify(told));
