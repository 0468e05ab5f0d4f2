import { mkdtemp, readdir, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { MmditxError } from '../../src/errors.ts';
import { loadAutoencoder } from '../../src/models/autoencoder.ts';
import { loadClip, loadT5 } from '../../src/models/text-encoders.ts';
import type { Runtime } from '../../src/runtime/runtime.ts';
import { type FloatTensor, floats, toFloat16, toFloat32 } from '../../src/tensor/data.ts';
import { type Encoders, encodePrompts } from '../../src/text/conditioning.ts';
import { clipTokenizer, t5Tokenizer } from '../../src/text/tokenizer.ts';
import { tokenizePrompt } from '../../src/text/tokens.ts';
import { type EncodedCache, openEncodedCache } from '../../src/training/encoded-cache.node.ts';
import {
  createEncodings,
  type EncodedText,
  type EncodingsOptions,
  type FillProgress,
  joinEncodedText,
  type LatentRequest,
} from '../../src/training/encodings.node.ts';
import { type Checkpoint, openCheckpoint } from '../../src/weights/checkpoint.ts';
import { type FileSource, fileSource } from '../../src/weights/files.node.ts';
import { cpu, maxDifference, randomFloats } from '../support/run.ts';
import { writeTinyModel } from '../support/tiny-model.ts';

const ALL = { clipL: true, clipG: true, t5: true };
const NONE = { clipL: false, clipG: false, t5: false };

const sources: FileSource[] = [];
const folders: string[] = [];
let tiny: Checkpoint;
let tinyPath: string;
let cache: EncodedCache;

async function opened(path: string): Promise<Checkpoint> {
  const source = await fileSource(path);
  sources.push(source);
  return openCheckpoint([source]);
}
async function newFolder(): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'mmditx-encodings-'));
  folders.push(folder);
  return folder;
}
beforeAll(async () => {
  tinyPath = join(await newFolder(), 'tiny.safetensors');
  await writeTinyModel(tinyPath);
  tiny = await opened(tinyPath);
});
beforeEach(async () => {
  cache = openEncodedCache(await newFolder());
});
afterAll(async () => {
  await Promise.all(sources.map((source) => source.close()));
  await Promise.all(folders.map((folder) => rm(folder, { recursive: true })));
});

/** A request for a picture of which there is no file: `rendered` makes it up from its digest. */
function request(seed: number, width = 32, height = 16): LatentRequest {
  return {
    picture: { path: `/${seed}.png`, name: `${seed}.png`, digest: String(seed) },
    view: {
      width,
      height,
      fit: 'cover',
      crop: [0.5, 0.5],
      flip: false,
      background: [255, 255, 255],
      filter: 'lanczos3',
    },
  };
}

/** Encodings of the tiny model with made-up pictures, and which of them were rendered. */
function encodings(options: Partial<EncodingsOptions> = {}) {
  const rendered: string[] = [];
  const made = createEncodings({
    checkpoint: tiny,
    runtime: cpu,
    render: async ({ name }, { width, height }) => {
      rendered.push(name);
      if (name.startsWith('666')) throw new MmditxError('bad-file', `${name} is damaged.`);
      return randomFloats([1, 3, height, width], Number.parseInt(name, 10));
    },
    ...options,
  });
  return { ...made, rendered };
}

/** A runtime that counts the programs it holds, or has none. */
function counting(): { runtime: Runtime; compiled: number; held: number; most: number } {
  const counts = {
    compiled: 0,
    held: 0,
    most: 0,
    runtime: {
      ...cpu,
      async compile(...given: Parameters<Runtime['compile']>) {
        counts.compiled++;
        counts.most = Math.max(counts.most, ++counts.held);
        const executable = await cpu.compile(...given);
        return {
          ...executable,
          dispose() {
            counts.held--;
            return executable.dispose();
          },
        };
      },
    },
  };
  return counts;
}

/** Whether values are others rounded to half precision, up to a last bit. */
function expectHalf(actual: FloatTensor, expected: FloatTensor): void {
  expect(actual.shape).toEqual(expected.shape);
  // They are half-precision numbers.
  const again = toFloat32({ dtype: 'float16', shape: actual.shape, data: toFloat16(actual.data) });
  expect(maxDifference(actual, { data: again })).toBe(0);
  const worst = actual.data.reduce(
    (most, value, i) => Math.max(most, Math.abs(value - expected.data[i]!) / (Math.abs(expected.data[i]!) + 1e-2)),
    0,
  );
  expect(worst).toBeLessThan(2 ** -10);
}

describe('latents', () => {
  it('are what the autoencoder makes of each picture, sizes mixed', async () => {
    const requests = [request(1), request(2, 16, 16), request(3), request(1)];
    const { latents, dispose, rendered } = encodings();
    const found = await latents(requests);
    await dispose();
    expect([...rendered].sort()).toEqual(['1.png', '2.png', '3.png']);
    const vae = loadAutoencoder(cpu, tiny.parts.vae!);
    for (const [i, { picture, view }] of requests.entries()) {
      const image = randomFloats([1, 3, view.height, view.width], Number(picture.digest));
      expectHalf(found[i]!, await vae.encode(image));
    }
    await vae.dispose();
  });

  it('are kept in memory as long as there is room', async () => {
    // Moments of 2 x 4 latent pixels in float32.
    const { latents, dispose, rendered } = encodings({ memoryBytes: 2 * 32 * 8 * 4 });
    for (const seed of [1, 2, 1, 3, 1, 2]) await latents([request(seed)]);
    await dispose();
    expect(rendered).toEqual(['1.png', '2.png', '3.png', '2.png']);
  });

  it('come from the cache without a network, and are the same', async () => {
    const first = encodings({ cache });
    const made = await first.latents([request(1), request(2)]);
    await first.dispose();
    const counts = counting();
    const second = encodings({ cache, runtime: counts.runtime });
    expect(await second.latents([request(2), request(1)])).toEqual([made[1], made[0]]);
    expect([second.rendered, counts.compiled]).toEqual([[], 0]);
  });

  it('of another view or picture are others', async () => {
    const { latents, dispose, rendered } = encodings({ cache });
    const { picture, view } = request(1);
    const others: LatentRequest[] = [
      { picture, view },
      { picture: { ...picture, digest: 'changed' }, view },
      { picture, view: { ...view, crop: [0.5, 0.4] } },
      { picture, view: { ...view, flip: true } },
      { picture, view: { ...view, background: [255, 255, 254] } },
      { picture, view: { ...view, fit: 'contain' } },
      { picture, view: { ...view, filter: 'linear' } },
      { picture, view: { ...view, width: 16, height: 32 } },
    ];
    await latents(others);
    expect(rendered).toHaveLength(others.length);
    await latents(others.map(({ picture, view }) => ({ picture: { ...picture, path: '/moved' }, view: { ...view } })));
    await dispose();
    expect(rendered).toHaveLength(others.length);
  });

  it('belong to the weights of the encoder, wherever their file lies', async () => {
    const first = encodings({ cache });
    await first.latents([request(1)]);
    await first.dispose();
    const copy = join(await newFolder(), 'copy.safetensors');
    await writeTinyModel(copy);
    /** With one weight in the place of another. */
    const changed = (half: string): Checkpoint => {
      const vae = tiny.parts.vae!;
      const other = vae.tensors.get(`${half}.mid.block_2.conv1.weight`)!;
      const tensors = new Map([...vae.tensors, [`${half}.mid.block_1.conv1.weight`, other] as const]);
      return { ...tiny, parts: { ...tiny.parts, vae: { ...vae, tensors } } };
    };
    const rendersWith = async (checkpoint: Checkpoint) => {
      const { latents, dispose, rendered } = encodings({ checkpoint, cache });
      await latents([request(1)]);
      await dispose();
      return rendered.length;
    };
    expect(await rendersWith(await opened(copy))).toBe(0);
    expect(await rendersWith(changed('decoder'))).toBe(0);
    expect(await rendersWith(changed('encoder'))).toBe(1);
  });

  it('that are not finite are refused, not kept', async () => {
    const path = join(await newFolder(), 'broken.safetensors');
    await writeTinyModel(path, { broken: 'first_stage_model.encoder.conv_in.weight' });
    const { latents, dispose } = encodings({ checkpoint: await opened(path), cache });
    await expect(latents([request(1)])).rejects.toMatchObject({
      code: 'not-finite',
      message: expect.stringMatching(/^The VAE gives values that are not finite/),
    });
    await dispose();
    expect(await readdir(cache.folder)).toEqual([]);
  });

  it('need a VAE', async () => {
    const { clipL } = tiny.parts;
    const { latents } = encodings({ checkpoint: { ...tiny, parts: { clipL: clipL! } } });
    await expect(latents([request(1)])).rejects.toMatchObject({ code: 'missing-part' });
  });
});

describe('texts', () => {
  const captions = ['a red fox', 'two cats and a dog', '', 'a red fox'];

  it('of the model that ships are what generation gives the transformer', async () => {
    const checkpoint = await opened(resolve('models/small/mmditx-small.safetensors'));
    const { parts, tokenizers } = checkpoint;
    const { contextWidth, pooledWidth } = parts.transformer!.config;
    const encoders = {
      clipL: loadClip(cpu, parts.clipL!),
      clipG: loadClip(cpu, parts.clipG!),
      t5: loadT5(cpu, parts.t5!),
      contextWidth,
      pooledWidth,
    } satisfies Encoders;
    const tokenizer = clipTokenizer(tokenizers.clip!);
    const prompts = captions.map((caption) =>
      tokenizePrompt(
        caption,
        {
          clipL: { tokenizer, positions: parts.clipL!.config.positions },
          clipG: { tokenizer, positions: parts.clipG!.config.positions },
          t5: { tokenizer: t5Tokenizer(tokenizers.t5!) },
        },
        { t5Tokens: { minimum: parts.t5!.config.tokens } },
      ),
    );
    const expected = await encodePrompts(prompts, encoders);
    await Promise.all([encoders.clipL, encoders.clipG, encoders.t5].map((encoder) => encoder.dispose()));

    const { texts, dispose } = createEncodings({ checkpoint, runtime: cpu });
    const found = await texts(captions);
    await dispose();
    for (const [i, text] of found.entries()) {
      const { context, pooled } = joinEncodedText(text, ALL, encoders);
      expectHalf(context, expected[i]!.context);
      expectHalf(pooled, expected[i]!.pooled);
    }
  });

  it('with weights in brackets, in chunks, and without T5 are so too', async () => {
    const { t5: _, ...parts } = tiny.parts;
    const widths = { contextWidth: 192, pooledWidth: 192 };
    const tokens = { syntax: 'comfy', longPrompt: 'chunk' } as const;
    const caption = 'a (red:1.5) fox on a blue background and a house by the sea and a green tree and two cats';
    const tokenizer = clipTokenizer(tiny.tokenizers.clip!);
    const positions = parts.clipL!.config.positions;
    const prompt = tokenizePrompt(
      caption,
      { clipL: { tokenizer, positions }, clipG: { tokenizer, positions } },
      tokens,
    );
    const encoders = { clipL: loadClip(cpu, parts.clipL!), clipG: loadClip(cpu, parts.clipG!), ...widths };
    const [expected] = await encodePrompts([prompt], encoders);
    const onlyG = await encodePrompts([prompt], { clipG: encoders.clipG, ...widths });
    await Promise.all([encoders.clipL.dispose(), encoders.clipG.dispose()]);

    const { texts, dispose } = encodings({ checkpoint: { ...tiny, parts }, tokens });
    const [text] = await texts([caption]);
    await dispose();
    const rows = prompt.clipL!.rows.length;
    expect(rows).toBeGreaterThan(1);
    expect(text!.clipL!.hidden.shape).toEqual([1, rows * positions, 64]);
    expectHalf(joinEncodedText(text!, ALL, widths).context, expected!.context);
    expectHalf(joinEncodedText({ clipG: text!.clipG! }, ALL, widths).context, onlyG[0]!.context);
    expectHalf(joinEncodedText({ clipG: text!.clipG! }, ALL, widths).pooled, onlyG[0]!.pooled);
  });

  it('of one length each are made by default, and say what was cut', async () => {
    const warnings: [string, string][] = [];
    const long = 'a red fox and a green tree and two cats and a dog on a blue background';
    const { texts, dispose } = encodings({ onWarning: (text, message) => warnings.push([text, message]) });
    const found = await texts([long, 'a (red:1.5) fox']);
    await dispose();
    for (const { clipL, clipG, t5 } of found) {
      expect([clipL!.hidden.shape[1], clipG!.hidden.shape[1], t5!.shape[1]]).toEqual([16, 16, 16]);
    }
    const ofLong = warnings.filter(([text]) => text === long).map(([, message]) => message);
    expect(ofLong).toEqual([
      expect.stringMatching(/^CLIP-L and CLIP-G read the first 14 tokens/),
      expect.stringMatching(/^T5 reads the first 15 tokens/),
    ]);
  });

  it('come from the cache without a network, and are the same', async () => {
    const first = encodings({ cache });
    const made = await first.texts(captions);
    await first.dispose();
    const counts = counting();
    const second = encodings({ cache, runtime: counts.runtime });
    expect(await second.texts(captions)).toEqual(made);
    expect(counts.compiled).toBe(0);
    // Another length for T5 leaves what the others made.
    const third = encodings({ cache, runtime: counts.runtime, tokens: { t5Tokens: { length: 20 } } });
    expect((await third.texts(['a red fox']))[0]!.t5!.shape[1]).toBe(20);
    expect(counts.compiled).toBe(1);
    await third.dispose();
  });

  it('need an encoder and its tokenizer', async () => {
    const { vae, clipL } = tiny.parts;
    const without = encodings({ checkpoint: { ...tiny, parts: { vae: vae! } } });
    await expect(without.texts(['a'])).rejects.toMatchObject({ code: 'missing-part' });
    const bare = { ...tiny, parts: { clipL: clipL! }, tokenizers: {} };
    await expect(encodings({ checkpoint: bare }).texts(['a'])).rejects.toThrow(/no CLIP tokenizer/);
    const given = encodings({ checkpoint: bare, tokenizers: { clip: tiny.tokenizers.clip } });
    expect(Object.keys((await given.texts(['a']))[0]!)).toEqual(['clipL']);
    await given.dispose();
  });
});

describe('joining', () => {
  const ones = (shape: readonly number[], value: number) =>
    floats(shape, new Float32Array(shape.reduce((a, b) => a * b, 1)).fill(value));
  const text: EncodedText = {
    clipL: { hidden: ones([1, 2, 2], 1), pooled: ones([1, 2], 2) },
    clipG: { hidden: ones([1, 2, 3], 3), pooled: ones([1, 3], 4) },
    t5: ones([1, 3, 6], 5),
  };
  const widths = { contextWidth: 6, pooledWidth: 5 };

  it.each([
    ['all', ALL, [1, 1, 3, 3, 3, 0], 5, [2, 2, 4, 4, 4]],
    ['all but CLIP-L', { ...ALL, clipL: false }, [0, 0, 3, 3, 3, 0], 5, [0, 0, 4, 4, 4]],
    ['all but CLIP-G', { ...ALL, clipG: false }, [1, 1, 0, 0, 0, 0], 5, [2, 2, 0, 0, 0]],
    ['all but T5', { ...ALL, t5: false }, [1, 1, 3, 3, 3, 0], 0, [2, 2, 4, 4, 4]],
    ['nothing', NONE, [0, 0, 0, 0, 0, 0], 0, [0, 0, 0, 0, 0]],
  ])('keeps %s', (_, keep, clip, t5, pooled) => {
    const joined = joinEncodedText(text, keep, widths);
    expect(joined.context.shape).toEqual([1, 5, 6]);
    expect([...joined.context.data]).toEqual([...clip, ...clip, ...new Array<number>(18).fill(t5)]);
    expect(joined.pooled.shape).toEqual([1, 5]);
    expect([...joined.pooled.data]).toEqual(pooled);
  });

  it('refuses a text that no encoder has seen', () => {
    expect(() => joinEncodedText({}, ALL, widths)).toThrow(MmditxError);
  });
});

describe('filling the cache', () => {
  const wanted = {
    latents: [request(1), request(2, 16, 16), request(3), request(4), request(1)],
    texts: ['a red fox', 'a green tree', '', 'a red fox'],
  };

  it('loads one encoder after the other, says how far it is, and gives all memory back', async () => {
    const counts = counting();
    const { fill, latents, texts, rendered } = encodings({ cache, runtime: counts.runtime });
    const progress: FillProgress[] = [];
    await fill(wanted, { onProgress: (now) => progress.push(now), batchSize: 2 });
    expect([counts.compiled, counts.most, counts.held]).toEqual([4, 1, 0]);
    const last = new Map(progress.map(({ part, done, total }) => [part, [done, total]]));
    expect([...last]).toEqual([
      ['vae', [4, 4]],
      ['clipL', [3, 3]],
      ['clipG', [3, 3]],
      ['t5', [3, 3]],
    ]);
    expect([...rendered].sort()).toEqual(['1.png', '2.png', '3.png', '4.png']);
    await latents(wanted.latents);
    await texts(wanted.texts);
    await fill(wanted);
    expect(counts.compiled).toBe(4);
    expect((await readdir(join(cache.folder, 'claims'))).filter((name) => name !== '.clock')).toEqual([]);
  });

  it('is shared by several at once', async () => {
    const several = Array.from({ length: 3 }, () => encodings({ cache }));
    const latents = Array.from({ length: 12 }, (_, i) => request(i));
    await Promise.all(several.map(({ fill }) => fill({ latents }, { batchSize: 2, staleSeconds: 2 })));
    const rendered = several.flatMap((one) => one.rendered);
    expect(rendered.length).toBe(12);
    expect(new Set(rendered).size).toBe(12);
  });

  it('skips pictures that are damaged, and says which', async () => {
    const skipped: string[] = [];
    const { fill } = encodings({ cache });
    const latents = [request(1), request(666), request(2)];
    await fill(
      { latents },
      { onSkip: ({ picture }, { message }) => skipped.push(`${picture.name}: ${message}`), staleSeconds: 2 },
    );
    expect(skipped).toEqual(['666.png: 666.png is damaged.']);
    const { latents: of, rendered } = encodings({ cache });
    await of([request(1), request(2)]);
    expect(rendered).toEqual([]);
  });

  it('stops with the signal’s reason', async () => {
    const stop = new AbortController();
    const reason = new Error('enough');
    stop.abort(reason);
    await expect(encodings({ cache }).fill(wanted, { signal: stop.signal })).rejects.toBe(reason);
  });

  it('does nothing without a cache', async () => {
    const { fill, rendered } = encodings();
    await fill(wanted);
    expect(rendered).toEqual([]);
  });
});
