// Answers of a folder as transformers.js gives them: node transformers_js.mjs NODE_MODULES FOLDER < JSON > JSON
import { readFileSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { pathToFileURL } from "node:url";

const [modules, folder] = process.argv.slice(2);
const entry = join(modules, "@huggingface/transformers/dist/transformers.node.mjs");
const { AutoProcessor, AutoModelForImageTextToText, RawImage, Tensor, env } = await import(pathToFileURL(entry));
env.allowRemoteModels = false;
env.useFSCache = false;
env.localModelPath = dirname(folder);
const name = basename(folder);
const { image, prompt, ids, pixels, steps } = JSON.parse(readFileSync(0, "utf8"));

const model = await AutoModelForImageTextToText.from_pretrained(name);
const long = (numbers) => new Tensor("int64", BigInt64Array.from(numbers.map(BigInt)), [1, numbers.length]);
const inputs = { input_ids: long(ids), attention_mask: long(ids.map(() => 1)) };
if (pixels) inputs.pixel_values = new Tensor("float32", Float32Array.from(pixels.data), pixels.dims);
const out = await model.generate({ ...inputs, max_new_tokens: steps, do_sample: false, eos_token_id: -1 });
const { logits } = await model({ ...inputs });
const processor = await AutoProcessor.from_pretrained(name);
const given = await processor(await RawImage.read(image), prompt);
console.log(JSON.stringify({
  prompt_ids: Array.from(given.input_ids.data, Number),
  pixels: Array.from(given.pixel_values.data),
  generated: Array.from(out.data, Number).slice(ids.length),
  logits: Array.from(logits.data),
}));
