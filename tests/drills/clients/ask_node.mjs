// OpenAI's library for Node. Prints what it got as one JSON object.
import OpenAI from "openai";

const { BASE_URL: baseURL, API_KEY: apiKey } = process.env;
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
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
await new OpenAI({ baseURL, apiKey, maxRetries: 1 }).chat.completions.create({ model: "odd", messages, user: "full once" });
told.retried_after = (Date.now() - begun) / 1000;

const stream = await client.chat.completions.create({ model: "odd", messages, stream: true });
told.aborted = 0;
for await (const _event of stream) {
  told.aborted += 1;
  if (told.aborted === 3) stream.controller.abort();
}
console.log(JSON.stringify(told));
