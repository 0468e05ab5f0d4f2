import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { settingsFromPng } from '../../src/image/settings.ts';
import { type GenerateOptions, type GenerationEvent, load, type StableDiffusion } from '../../src/index.node.ts';
import { floats } from '../../src/tensor/data.ts';
import { writeTinyModel } from '../support/tiny-model.ts';

let folder: string;
let sd: StableDiffusion;
const options = { prompt: 'a red fox', seed: 3, steps: 3, sampler: 'euler' } satisfies GenerateOptions;

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'mmditx-pipeline-'));
  await writeTinyModel(join(folder, 'tiny.safetensors'));
  sd = await load(join(folder, 'tiny.safetensors'));
});
afterAll(async () => {
  await sd.dispose();
  await rm(folder, { recursive: true });
});

async function pixels(changed: Partial<GenerateOptions> = {}): Promise<number[]> {
  const [image] = await sd.generate({ ...options, ...changed });
  return [...image!.data];
}

/** Half of the picture is repainted. */
function leftHalf(size: number) {
  const mask = Float32Array.from({ length: size * size }, (_, i) => (i % size < size / 2 ? 1 : 0));
  return floats([1, 1, size, size], mask);
}

describe('generate', () => {
  it('draws in the size and with the settings that the model states', async () => {
    const [image] = await sd.generate({ prompt: 'a house' });
    expect([image!.width, image!.height, image!.data.length]).toEqual([32, 32, 32 * 32 * 3]);
    expect(image!.settings).toMatchObject({ steps: 4, cfg: 3, sampler: 'dpmpp_2m', scheduler: 'normal', shift: 3 });
  });

  it('depends on nothing but its options', async () => {
    expect(await pixels()).toEqual(await pixels());
  });

  it.each([
    ['the prompt', { prompt: 'a green tree' }],
    ['the weight of a word', { prompt: 'a (red:1.6) fox' }],
    ['a lowered word', { prompt: 'a [[red]] fox' }],
    ['the negative prompt', { negativePrompt: 'dog' }],
    ['the seed', { seed: 4 }],
    ['guidance', { cfg: 1 }],
    ['the number of steps', { steps: 4 }],
    ['the sampler', { sampler: 'heun' }],
    ['the schedule', { scheduler: 'karras' }],
    ['the shift', { shift: 1 }],
    ['skip-layer guidance', { skipLayerGuidance: { start: 0, end: 1 } }],
  ] satisfies [string, Partial<GenerateOptions>][])('heeds %s', async (_name, changed) => {
    expect(await pixels(changed)).not.toEqual(await pixels());
  });

  it('reuses steps with a step cache, says so in the settings, and computes everything with a threshold of 0', async () => {
    const steps = 12;
    const [cached] = await sd.generate({ ...options, steps, stepCache: true });
    expect(cached!.settings.stepCache).toBe(0.1);
    expect(await pixels({ steps, stepCache: 1 })).not.toEqual(await pixels({ steps }));
    expect(await pixels({ steps, stepCache: 0 })).toEqual(await pixels({ steps }));
    await expect(sd.generate({ ...options, stepCache: 1.5 })).rejects.toThrow(/threshold of the step cache is 1.5/);
  });

  it('draws any size in multiples of 16, portrait and landscape, with the same sessions', async () => {
    for (const [width, height] of [
      [16, 48],
      [64, 32],
      [128, 16],
    ] as const) {
      const [image] = await sd.generate({ ...options, width, height });
      expect([image!.width, image!.height]).toEqual([width, height]);
    }
  });

  it('draws a batch whose noise is one stream', async () => {
    const images = await sd.generate({ ...options, batchSize: 3 });
    expect(images.map(({ settings }) => settings.batch)).toEqual([0, 1, 2].map((index) => ({ index, size: 3 })));
    const [first, second] = images.map(({ data }) => [...data]);
    expect(second).not.toEqual(first);
    const alone = await pixels();
    // The same noise as alone; sums in another order may move a value across a rounding edge.
    const largest = Math.max(...alone.map((value, i) => Math.abs(value - first![i]!)));
    expect(largest).toBeLessThanOrEqual(1);
  });

  it('streams steps with previews, then the pictures', async () => {
    const events: GenerationEvent[] = [];
    for await (const event of sd.stream(options)) {
      events.push(event);
      if (event.type !== 'step') continue;
      const [preview] = await event.preview();
      expect([preview!.width, preview!.height]).toEqual([4, 4]);
    }
    expect(events.map(({ type }) => type)).toEqual(['step', 'step', 'step', 'images']);
    expect(events.flatMap((event) => (event.type === 'step' ? [event.step] : []))).toEqual([1, 2, 3]);
  });

  it('draws two pictures at once, one of them with skip-layer guidance', async () => {
    const guided = { skipLayerGuidance: { start: 0, end: 1 } };
    const apart = [await pixels(), await pixels(guided)];
    expect(await Promise.all([pixels(), pixels(guided)])).toEqual(apart);
  });

  it('stops when the model is disposed of, and does not load it again', async () => {
    const model = await load(join(folder, 'tiny.safetensors'));
    const drawing = model.generate({ ...options, steps: 50 }, (event) => {
      if (event.type === 'step' && event.step === 2) void model.dispose();
    });
    await expect(drawing).rejects.toThrow(/disposed of/);
    await expect(model.generate(options)).rejects.toThrow(/disposed of/);
  });

  it('stops between two steps when its signal says so', async () => {
    const stop = new AbortController();
    const steps: number[] = [];
    const drawing = sd.generate({ ...options, steps: 50, signal: stop.signal }, (event) => {
      if (event.type !== 'step') return;
      steps.push(event.step);
      if (event.step === 2) stop.abort(new Error('enough'));
    });
    await expect(drawing).rejects.toThrow('enough');
    expect(steps).toEqual([1, 2]);
  });

  it('puts the settings into the PNG file', async () => {
    const [image] = await sd.generate({ ...options, prompt: 'a fox – крас', seed: 2n ** 63n });
    const found = settingsFromPng(image!.png());
    expect(found).toEqual({ source: 'mmditx', settings: image!.settings });
  });

  it('says when T5 gets more tokens than the model was trained with', async () => {
    const messages: string[] = [];
    await sd.generate({ ...options, prompt: 'a red fox and '.repeat(12) }, (event) => {
      if (event.type === 'warning') messages.push(event.message);
    });
    expect(messages.join(' ')).toMatch(/beyond 16, this model was not trained/);
  });

  it('says which words were cut', async () => {
    const messages: string[] = [];
    const prompt = `a red fox ${'and a dog '.repeat(12)}by the sea`;
    await sd.generate({ ...options, prompt, longPrompt: 'truncate' }, (event) => {
      if (event.type === 'warning') messages.push(event.message);
    });
    expect(messages.join(' ')).toMatch(/by the sea/);
  });
});

describe('image to image', () => {
  it('leaves the noise less to say with less strength', async () => {
    const [initImage] = await sd.generate(options);
    const spread = async (strength: number) => {
      const of = (seed: number) => pixels({ initImage: initImage!, strength, seed, steps: 10 });
      const [one, other] = [await of(8), await of(9)];
      return one.reduce((sum, value, i) => sum + Math.abs(value - other[i]!), 0);
    };
    expect(await spread(0.2)).toBeLessThan(await spread(1));
  });

  it.each(['stability', 'comfyui', 'diffusers'] as const)('runs the steps of the rule %s', async (denoiseRule) => {
    const [initImage] = await sd.generate(options);
    let steps = 0;
    await sd.generate({ ...options, steps: 10, initImage: initImage!, strength: 0.5, denoiseRule }, (event) => {
      if (event.type === 'step') steps++;
    });
    expect(steps).toBe(denoiseRule === 'comfyui' ? 10 : 5);
  });

  it('repaints what the mask says and keeps every other pixel, with skip-layer guidance, too', async () => {
    const [initImage] = await sd.generate(options);
    const repainted = await pixels({
      initImage: initImage!,
      mask: leftHalf(32),
      seed: 8,
      skipLayerGuidance: { start: 0, end: 1 },
    });
    const half = (keep: boolean) => (_: number, i: number) => Math.floor(i / 3) % 32 >= 16 === keep;
    expect(repainted.filter(half(true))).toEqual([...initImage!.data].filter(half(true)));
    expect(repainted.filter(half(false))).not.toEqual([...initImage!.data].filter(half(false)));
  });
});

describe('generate refuses in one sentence', () => {
  it('a strength that leaves no step', async () => {
    const [initImage] = await sd.generate(options);
    await expect(sd.generate({ ...options, initImage: initImage!, strength: 1e-20 })).rejects.toThrow(
      /leaves none of 3/,
    );
  });

  it.each([
    [{ width: 100 }, /width is 100.*multiples of 16 from 16 to 128 pixels, such as 96/],
    [{ height: 144 }, /height is 144.*such as 128/],
    [{ steps: 0 }, /steps is 0; give 1 to/],
    [{ steps: 2.5 }, /steps is 2.5/],
    [{ cfg: Number.NaN }, /guidance scale is NaN/],
    [{ seed: -1 }, /seed is -1/],
    [{ seed: 2n ** 64n }, /seed is 18446744073709551616/],
    [{ batchSize: 1000 }, /batch size is 1000/],
    [{ strength: 0 }, /strength is 0/],
    [{ prompt: 'fox '.repeat(30_000) }, /prompt has 120000 characters/],
    [{ mask: leftHalf(32) }, /needs an initial picture/],
    [{ sampler: 'ddim' as 'euler' }, /no sampler "ddim"; choose one of euler/],
    [{ skipLayerGuidance: { start: 0.5, end: 0.2 } }, /window is 0.5 to 0.2/],
    [{ skipLayerGuidance: { rule: 'time' as 'steps' } }, /no rule of the skip-layer window "time"/],
    [{ longPrompt: 'cut' as 'chunk' }, /no way with long prompts "cut"/],
    [{ missingT5: 0 }, /missing T5 are 0/],
    [{ skipLayerGuidance: { layers: [3], start: 0, end: 1 } }, /no layer 3 to skip.*0 to 2/],
  ] satisfies [Partial<GenerateOptions>, RegExp][])('case %#', async (changed, message) => {
    await expect(sd.generate({ ...options, ...changed })).rejects.toThrow(message);
  });

  it('an empty prompt is no mistake', async () => {
    expect(await pixels({ prompt: '' })).toHaveLength(32 * 32 * 3);
  });
});

describe('incomplete and broken checkpoints', () => {
  const withModel = async (tiny: Parameters<typeof writeTinyModel>[1], use: (path: string) => Promise<void>) => {
    const path = join(folder, 'other.safetensors');
    await writeTinyModel(path, tiny);
    await use(path);
  };

  it('draws without T5, and says so', async () => {
    await withModel({ without: 'text_encoders.t5xxl' }, async (path) => {
      const model = await load(path);
      const messages: string[] = [];
      const images = await model.generate(options, (event) => {
        if (event.type === 'warning') messages.push(event.message);
      });
      expect(images).toHaveLength(1);
      expect(messages.join()).toMatch(/no T5 text encoder/);
      await model.dispose();
    });
  });

  it.each([
    ['first_stage_model', /no VAE in .*other\.safetensors/],
    ['model.diffusion_model', /no transformer in .*other\.safetensors/],
    ['text_encoders', /no text encoder/],
  ])('names what is missing without %s', async (without, message) => {
    await withModel({ without }, async (path) => {
      await expect(load(path)).rejects.toThrow(message);
    });
  });

  it('names the weight that is not a number', async () => {
    const broken = 'model.diffusion_model.joint_blocks.1.x_block.mlp.fc1.weight';
    await withModel({ broken }, async (path) => {
      const model = await load(path);
      await expect(model.generate(options)).rejects.toThrow(/x_block\.mlp\.fc1\.weight.*not finite/);
      await model.dispose();
    });
  });
});
