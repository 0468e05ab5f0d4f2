import { copyFile, mkdir, mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, it, test } from 'vitest';
import { type GenerateOptions, load, openLora, readLora, type StableDiffusion } from '../../src/index.node.ts';
import type { TensorData } from '../../src/tensor/data.ts';
import { clipTokenizer } from '../../src/text/tokenizer.ts';
import { trainClipTokenizer, trainT5Tokenizer } from '../../src/training/tokenizer-training.ts';
import { writeSafetensorsFile } from '../../src/weights/files.node.ts';
import type { Lora } from '../../src/weights/lora.ts';
import { CLIP_TOKENIZER_KEY, configMetadata, T5_TOKENIZER_KEY } from '../../src/weights/metadata.ts';
import { readGolden } from '../support/golden.ts';
import { goldenCheckpoint } from '../support/models.ts';
import { bytesSource } from '../weights/sources.ts';

const LORA = 'test/golden/lora_kohya.safetensors';
const SAME_IN_DIFFUSERS_LAYOUT = 'test/golden/lora_diffusers.safetensors';

let folder: string;
let model: string;
let loraFolder: string;
let sd: StableDiffusion;
let lora: Lora;

/** The golden model, whose weights the golden LoRAs change, with tokenizers. */
async function writeGoldenModel(path: string): Promise<void> {
  const captions = ['a red fox on a blue background', 'a green tree', 'two cats and a dog'];
  const clip = trainClipTokenizer(captions, { vocabularySize: 600 });
  const { end } = clipTokenizer(clip);
  const { transformer, vae, clipL, clipG, t5 } = (await goldenCheckpoint()).parts;
  const ends = { bosId: end - 1, eosId: end };
  const tensors: Map<string, TensorData> = readGolden('tiny_sd35');
  await writeSafetensorsFile(path, tensors, {
    ...configMetadata({
      transformer: transformer!.config,
      vae: vae!.config,
      clipL: { ...clipL!.config, ...ends, padId: end },
      clipG: { ...clipG!.config, ...ends },
      t5: t5!.config,
    }),
    [CLIP_TOKENIZER_KEY]: clip,
    [T5_TOKENIZER_KEY]: trainT5Tokenizer(captions, { vocabularySize: 200 }),
  });
}

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'mmditx-loras-'));
  model = join(folder, 'golden.safetensors');
  loraFolder = join(folder, 'loras');
  await writeGoldenModel(model);
  await mkdir(loraFolder);
  await copyFile(LORA, join(loraFolder, 'my style.v1.safetensors'));
  sd = await load(model, { device: 'cpu', threads: 2, loraFolder });
  lora = await readLora(LORA);
});
afterAll(async () => {
  await sd.dispose();
  await rm(folder, { recursive: true });
});

const options: GenerateOptions = { prompt: 'a red fox', seed: 3, steps: 2, width: 64, height: 64, sampler: 'euler' };

async function pixels(changed: Partial<GenerateOptions> = {}, from = sd): Promise<number[]> {
  const [image] = await from.generate({ ...options, ...changed });
  return [...image!.data];
}

/** Largest difference of two pictures, of 255. */
function difference(a: readonly number[], b: readonly number[]): number {
  expect(a.length).toBe(b.length);
  return Math.max(...a.map((value, i) => Math.abs(value - b[i]!)));
}

test('a LoRA changes the picture, as an option and as a tag in the prompt alike', async () => {
  const plain = await pixels();
  const given = await pixels({ loras: [{ lora, strength: 0.8 }] });
  expect(difference(given, plain)).toBeGreaterThan(4);
  expect(await pixels({ prompt: 'a red fox<lora:my style.v1:0.8>' })).toEqual(given);
});

test('the same LoRA in the layout of diffusers gives the same picture', async () => {
  const other = await readLora(SAME_IN_DIFFUSERS_LAYOUT);
  const [one, two] = [
    await pixels({ loras: [{ lora, strength: 1 }] }),
    await pixels({ loras: [{ lora: other, strength: 1 }] }),
  ];
  expect(difference(one, two)).toBeLessThanOrEqual(1);
});

test('strengths change from one picture to the next, and none is none', async () => {
  const plain = await pixels();
  const full = await pixels({ loras: [{ lora, strength: 1 }] });
  const half = await pixels({ loras: [{ lora, strength: 0.5 }] });
  expect(half).not.toEqual(full);
  expect(await pixels({ loras: [{ lora, strength: 0 }] })).toEqual(plain);
  expect(await pixels({ loras: [{ lora, strength: 1 }] })).toEqual(full);
  expect(await pixels()).toEqual(plain);
});

test('options and tags add up', async () => {
  const twice = await pixels({ prompt: 'a red fox<lora:my style.v1:0.5>', loras: [{ lora, strength: 0.5 }] });
  expect(difference(twice, await pixels({ loras: [{ lora, strength: 1 }] }))).toBeLessThanOrEqual(1);
});

test('settings have the LoRAs of options by name, those of tags are in the prompt', async () => {
  const [image] = await sd.generate({
    ...options,
    prompt: 'a red fox<lora:my style.v1:0.5>',
    loras: [{ lora, strength: 0.5, clipStrength: 0.2 }],
  });
  expect(image!.settings.loras).toEqual([{ name: 'lora_kohya.safetensors', strength: 0.5, clipStrength: 0.2 }]);
  expect(image!.settings.prompt).toBe('a red fox<lora:my style.v1:0.5>');
});

test('a tag in the negative prompt warns and does nothing', async () => {
  const warnings: string[] = [];
  const [image] = await sd.generate({ ...options, negativePrompt: 'dog<lora:my style.v1>' }, (event) => {
    if (event.type === 'warning') warnings.push(event.message);
  });
  expect(warnings).toContain('LoRAs in the negative prompt have no effect.');
  expect([...image!.data]).toEqual(await pixels({ negativePrompt: 'dog' }));
});

test('a name that is no file is told with its path', async () => {
  await expect(pixels({ prompt: 'a red fox <lora:nothing:0.8>' })).rejects.toMatchObject({
    code: 'io',
    message: expect.stringContaining(join(loraFolder, 'nothing.safetensors')),
  });
  await expect(pixels({ prompt: 'a red fox <lora:../golden>' })).rejects.toThrow(/has a path for a name/);
});

test('a tag without a folder to look in is refused', async () => {
  const bare = await load(model, { device: 'cpu', threads: 2 });
  try {
    await expect(pixels({ prompt: 'a red fox <lora:my style.v1>' }, bare)).rejects.toThrow(
      /asks for the LoRA "my style\.v1".*give it as an option/,
    );
    // In ComfyUI's syntax it is text.
    expect((await pixels({ prompt: '<lora:my style.v1>', promptSyntax: 'comfy' }, bare)).length).toBeGreaterThan(0);
  } finally {
    await bare.dispose();
  }
});

test('a LoRA that does not fit is refused, and the model goes on', async () => {
  const plain = await pixels();
  const [layer] = lora.parts.transformer!.keys();
  const changes = lora.parts.transformer!.get(layer!)!;
  const wrong: Lora = { ...lora, name: 'wrong', parts: { transformer: new Map([['joint_blocks.77.w', changes]]) } };
  await expect(pixels({ loras: [{ lora: wrong, strength: 1 }] })).rejects.toThrow(/wrong does not fit this model/);
  await expect(pixels({ loras: [{ lora, strength: 101 }] })).rejects.toThrow(/strength of .* is 101/);
  expect(await pixels()).toEqual(plain);
});

// Networks are told apart by the names of their LoRAs.
it('two LoRAs of one name are two', async () => {
  const bytes = new Uint8Array(await readFile(LORA));
  const first = await openLora(bytesSource(bytes, 'lora.safetensors'));
  const parts = { transformer: new Map([...first.parts.transformer!].slice(0, 2)) };
  const one = await pixels({ loras: [{ lora: first, strength: 1 }] });
  expect(await pixels({ loras: [{ lora: { ...first, parts }, strength: 1 }] })).not.toEqual(one);
});

test('pictures with other LoRAs may be drawn at once', async () => {
  const apart = [await pixels(), await pixels({ loras: [{ lora, strength: 1 }] })];
  expect(await Promise.all([pixels(), pixels({ loras: [{ lora, strength: 1 }] })])).toEqual(apart);
});

test.each(['int8', 'int4', 'fp16'] as const)('a model in %s takes a LoRA', async (precision) => {
  const model8 = await load(model, { device: 'cpu', threads: 2, precision, cacheFolder: join(folder, 'cache') });
  try {
    expect(model8.precision).toBe(precision);
    const [plain, changed] = [await pixels({}, model8), await pixels({ loras: [{ lora, strength: 1 }] }, model8)];
    const [exact, exactlyChanged] = [await pixels(), await pixels({ loras: [{ lora, strength: 1 }] })];
    const mean = (a: readonly number[], b: readonly number[]) =>
      a.reduce((sum, value, i) => sum + Math.abs(value - b[i]!), 0) / a.length;
    // The change is the same; what is left is the rounding of the weights.
    const effect = mean(exactlyChanged, exact);
    expect(mean(changed, exactlyChanged)).toBeLessThan(precision === 'int4' ? effect : effect / 4);
    expect(mean(changed, plain)).toBeGreaterThan(effect / 2);
  } finally {
    await model8.dispose();
  }
});
