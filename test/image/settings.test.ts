import { describe, expect, test } from 'vitest';
import { encodePng } from '../../src/image/png.ts';
import {
  formatParameters,
  formatSettings,
  type GenerationSettings,
  parseParameters,
  parseSettings,
  settingsFromPng,
  settingsText,
} from '../../src/image/settings.ts';
import { samplerNames } from '../../src/sampling/samplers.ts';
import { scheduleNames } from '../../src/sampling/schedules.ts';

const settings: GenerationSettings = {
  version: 1,
  software: 'mmditx 0.1.0',
  model: { name: 'sd3.5_medium.safetensors', hash: null },
  device: 'cpu',
  precision: 'float32',
  prompt: 'a café, "quoted": 猫\nsecond line',
  negativePrompt: 'blurry, bad: worse',
  promptSyntax: 'comfy',
  longPrompt: 'chunk',
  t5Tokens: { minimum: 77 },
  width: 512,
  height: 768,
  steps: 28,
  cfg: 4.5,
  sampler: 'dpmpp_2m',
  scheduler: 'sgm_uniform',
  shift: 3,
  seed: 42,
  batch: { index: 1, size: 4 },
  loras: [],
  skipLayerGuidance: { layers: [7, 8, 9], scale: 2.5, start: 0.01, end: 0.2, rule: 'steps' },
  stepCache: 0.1,
  initImage: { sha256: 'ab'.repeat(32), strength: 0.6, denoiseRule: 'stability' },
  mask: { sha256: 'cd'.repeat(32), channel: 'luminance' },
};

const plain: GenerationSettings = {
  ...settings,
  prompt: 'a cat',
  negativePrompt: '',
  batch: { index: 0, size: 1 },
  skipLayerGuidance: null,
  stepCache: null,
  initImage: null,
  mask: null,
};

describe('settings as JSON', () => {
  test('survive exactly, in ASCII, whatever the prompt holds', () => {
    const odd = { ...settings, prompt: 'é 🐈 \u0000 \u2028 \ud800 \\u0041' };
    const json = formatSettings(odd);
    expect(json).toMatch(/^[\x20-\x7e]*$/);
    expect(parseSettings(json)).toEqual(odd);
  });

  test.each([0, 2 ** 53 - 1, 2n ** 53n, 2n ** 64n - 1n])('the seed %s is exact', (seed) => {
    expect(parseSettings(formatSettings({ ...plain, seed })).seed).toBe(seed);
  });

  test('a seed is a number in JSON until 2^53, then a string', () => {
    expect(JSON.parse(formatSettings(plain)).seed).toBe(42);
    expect(JSON.parse(formatSettings({ ...plain, seed: 2n ** 63n + 1n })).seed).toBe('9223372036854775809');
  });

  const bad = (change: object) => JSON.stringify({ ...settings, ...change });
  test.each([
    ['not JSON', 'nonsense', 'not JSON'],
    ['no object', '7', 'wrong'],
    ['a newer version', bad({ version: 2 }), 'update mmditx'],
    ['an unknown sampler', bad({ sampler: 'magic' }), '"sampler"'],
    ['a seed of 2^64', bad({ seed: '18446744073709551616' }), '"seed"'],
    ['a rounded seed', bad({ seed: 2 ** 60 }), '"seed"'],
    ['a negative seed', bad({ seed: -1 }), '"seed"'],
    ['a picture outside its batch', bad({ batch: { index: 4, size: 4 } }), '"batch"'],
    ['a missing prompt', bad({ prompt: undefined }), '"prompt"'],
  ])('%s is a bad file', (_, json, words) => {
    expect(() => parseSettings(json)).toThrow(
      expect.objectContaining({ code: 'bad-file', message: expect.stringContaining(words) }),
    );
  });

  test('entries of later programs are left out', () => {
    expect(parseSettings(bad({ later: true }))).toEqual(settings);
  });
});

describe('the parameters text', () => {
  test('is what stable-diffusion-webui writes', () => {
    expect(formatParameters(plain)).toBe(
      'a cat\nSteps: 28, Sampler: DPM++ 2M, Schedule type: SGM Uniform, CFG scale: 4.5, Seed: 42, Size: 512x768, ' +
        'Model: sd3.5_medium, Shift: 3, Version: mmditx 0.1.0',
    );
  });

  test('names all there is', () => {
    expect(formatParameters(settings)).toBe(
      'a café, "quoted": 猫\nsecond line\nNegative prompt: blurry, bad: worse\n' +
        'Steps: 28, Sampler: DPM++ 2M, Schedule type: SGM Uniform, CFG scale: 4.5, Seed: 42, Size: 512x768, ' +
        'Model: sd3.5_medium, Shift: 3, Denoising strength: 0.6, Batch size: 4, Batch pos: 1, ' +
        'Skip layers: "7, 8, 9", Skip layer scale: 2.5, Skip layer start: 0.01, Skip layer end: 0.2, ' +
        'Skip layer rule: steps, Step cache: 0.1, Version: mmditx 0.1.0',
    );
  });

  test('gives back what it was told', () => {
    const read = parseParameters(formatParameters(settings));
    const { prompt, negativePrompt, width, height, steps, cfg, sampler, scheduler, shift, seed } = settings;
    expect(read).toMatchObject({ prompt, negativePrompt, width, height, steps, cfg, sampler, scheduler, shift, seed });
    expect(read.skipLayerGuidance).toEqual(settings.skipLayerGuidance);
    expect(read.strength).toBe(0.6);
    expect(read.stepCache).toBe(0.1);
    expect(read.fields.get('Skip layers')).toBe('7, 8, 9');
  });

  test('every sampler and schedule has a name that is read again', () => {
    for (const sampler of samplerNames) {
      expect(parseParameters(formatParameters({ ...plain, sampler })).sampler).toBe(sampler);
    }
    for (const scheduler of scheduleNames) {
      expect(parseParameters(formatParameters({ ...plain, scheduler })).scheduler).toBe(scheduler);
    }
  });

  test('of an older stable-diffusion-webui is understood', () => {
    const read = parseParameters(
      'girl, (hat:1.2)\nin a desert\nNegative prompt: ugly,\n[blurry]\n' +
        'Steps: 20, Sampler: DPM++ 2M SDE Karras, CFG scale: 7, Seed: 965400086, Size: 512x704, ' +
        'Model hash: 45dee52b, Model: "a, b", Lora hashes: "x: 1, y: \\"2\\"", Clip skip: 2, Version: v1.7.0\n',
    );
    expect(read).toMatchObject({
      prompt: 'girl, (hat:1.2)\nin a desert',
      negativePrompt: 'ugly,\n[blurry]',
      steps: 20,
      sampler: 'dpmpp_2m_sde',
      scheduler: 'karras',
      cfg: 7,
      seed: 965400086,
      width: 512,
      height: 704,
    });
    expect(Object.fromEntries(read.fields)).toMatchObject({
      Model: 'a, b',
      'Lora hashes': 'x: 1, y: "2"',
      'Clip skip': '2',
      Version: 'v1.7.0',
    });
  });

  test('keeps what it does not know in words, and reads names of ComfyUI and in any case', () => {
    const read = parseParameters('x\nSteps: many, Sampler: UniPC, Schedule type: Automatic, CFG scale: high, Seed: -1');
    expect(read).toEqual({ prompt: 'x', negativePrompt: '', fields: read.fields });
    expect(read.fields.get('Sampler')).toBe('UniPC');
    expect(parseParameters('Steps: 1, Sampler: EULER_ANCESTRAL')).toMatchObject({
      prompt: '',
      sampler: 'euler_ancestral',
    });
  });

  test('without a line of fields is a prompt', () => {
    expect(parseParameters('a: b, c: d, e: f\nNegative prompt: g')).toMatchObject({
      prompt: 'a: b, c: d, e: f',
      negativePrompt: 'g',
    });
    expect(parseParameters('')).toEqual({ prompt: '', negativePrompt: '', fields: new Map() });
  });

  test('an empty prompt stays empty', () => {
    const read = parseParameters(formatParameters({ ...plain, prompt: '', negativePrompt: 'dogs' }));
    expect(read).toMatchObject({ prompt: '', negativePrompt: 'dogs', steps: 28 });
  });

  test('a seed beyond 2^53 is exact', () => {
    expect(parseParameters(formatParameters({ ...plain, seed: 2n ** 64n - 1n })).seed).toBe(2n ** 64n - 1n);
  });

  test.each([
    'Steps: aaaa'.repeat(50_000),
    'Steps: "\\"'.repeat(50_000),
    'Steps: ,: '.repeat(50_000),
    'Steps:\n'.repeat(70_000),
  ])('hostile text takes no time (%#)', (text) => {
    const started = performance.now();
    parseParameters(text);
    expect(performance.now() - started).toBeLessThan(1000);
  });
});

describe('settings in a picture', () => {
  const image = { width: 1, height: 1, data: Uint8Array.of(1, 2, 3) };

  test('come back whole', () => {
    const png = encodePng(image, { text: settingsText(settings) });
    expect(settingsFromPng(png)).toEqual({ source: 'mmditx', settings });
  });

  test("are another program's where ours are missing", () => {
    const png = encodePng(image, { text: new Map([['parameters', 'a 猫\nSteps: 3, Seed: 5']]) });
    expect(settingsFromPng(png)).toMatchObject({
      source: 'parameters',
      settings: { prompt: 'a 猫', steps: 3, seed: 5 },
    });
  });

  test('are undefined in a picture without any', () => {
    expect(settingsFromPng(encodePng(image))).toBeUndefined();
  });

  test('that are damaged are not silently replaced by the approximate ones', () => {
    const png = encodePng(image, {
      text: new Map([
        ['mmditx', '{}'],
        ['parameters', 'a\nSteps: 3'],
      ]),
    });
    expect(() => settingsFromPng(png)).toThrow(expect.objectContaining({ code: 'bad-file' }));
  });
});
