// What a program in Node does with a server, by the AI SDK; prints one JSON object.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamText, tool } from "ai";
import { z } from "zod";

const provider = createOpenAICompatible({
  name: "mole",
  baseURL: `${process.argv[2]}/v1`,
  apiKey: "any",
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const model = provider("tiny-writer");
const common = { model, prompt: "the fox", maxOutputTokens: 400, maxRetries: 0 };
const weather = tool({
  description: "The weather of a city.",
  inputSchema: z.object({ city: z.string().max(5) }),
});

const whole = await generateText({ ...common, maxOutputTokens: 8, temperature: 0 });
const stream = streamText({ ...common, maxOutputTokens: 8, temperature: 0 });
let streamed = "";
for await (const piece of stream.textStream) streamed += piece;
const usage = await stream.usage;

const { object } = await generateObject({
  ...common,
  schema: z.object({ colour: z.enum(["red", "green"]), age: z.number().int().min(0).max(9) }),
});

const one = { type: "tool", toolName: "weather" };
const called = await generateText({ ...common, tools: { weather }, toolChoice: one, seed: 2 });
const calling = streamText({ ...common, tools: { weather }, toolChoice: one, seed: 2 });
const streamedCalls = await calling.toolCalls;

let refused = null;
try {
  await generateText({ ...common, maxOutputTokens: 100000 });
} catch (error) {
  refused = error.message;
}
const inputs = (calls) => calls.map((call) => [call.toolName, call.input]);
console.log(
  JSON.stringify({
    whole: whole.text,
    streamed,
    tokens: usage.outputTokens,
    object,
    calls: inputs(called.toolCalls),
    streamedCalls: inputs(streamedCalls),
    reason: called.finishReason,
    refused,
  }),
);
