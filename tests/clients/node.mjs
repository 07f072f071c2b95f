// The clients of Node.js: openai with zod schemas, and Vercel's ai with its providers for OpenAI and compatible servers.
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import OpenAI from "openai";
import { zodFunction, zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const baseURL = `${process.env.SERVER}/v1`;
const question = "How is the weather in Tromsø?";
const messages = [{ role: "user", content: question }];
const City = z.object({ name: z.enum(["Oslo", "Tromsø"]), people: z.number().int().min(0).max(9) });
const Place = z.object({ city: z.enum(["Oslo", "Tromsø"]) });

const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const reply = await client.chat.completions.create({ model: "tiny", messages });
assert.equal(reply.choices[0].message.content, "The weather is fine.");
const parsed = await client.chat.completions.parse({
  model: "tiny",
  messages,
  response_format: zodResponseFormat(City, "city"),
});
City.parse(parsed.choices[0].message.parsed);
const stream = client.chat.completions.stream({ model: "tiny", messages });
let text = "";
for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
assert.equal(text, "The weather is fine.");
const response = await client.responses.parse({
  model: "tiny",
  input: question,
  text: { format: zodTextFormat(City, "city") },
});
City.parse(response.output_parsed);
const asked = [];
const runner = client.chat.completions.runTools({
  model: "tiny",
  messages,
  tools: [zodFunction({ name: "weather", parameters: Place, function: ({ city }) => (asked.push(city), "fine") })],
});
assert.equal(await runner.finalContent(), "The weather is fine.");
assert.deepEqual(asked, ["Tromsø"]);

const models = [
  createOpenAICompatible({ name: "octavo", baseURL, supportsStructuredOutputs: true })("tiny"),
  createOpenAI({ baseURL, apiKey: "none" }).chat("tiny"),
  createOpenAI({ baseURL, apiKey: "none" }).responses("tiny"),
];
for (const model of models) {
  assert.equal((await generateText({ model, prompt: question })).text, "The weather is fine.");
  assert.equal(await streamText({ model, prompt: question }).text, "The weather is fine.");
  const typed = await generateText({ model, prompt: question, output: Output.object({ schema: City }) });
  City.parse(typed.output);
  const weather = tool({ inputSchema: Place, execute: async ({ city }) => `fine in ${city}` });
  const result = await generateText({ model, prompt: question, tools: { weather }, stopWhen: stepCountIs(3) });
  assert.equal(result.text, "The weather is fine.");
  assert.deepEqual(result.steps[0].toolCalls[0].input, { city: "Tromsø" });
}
