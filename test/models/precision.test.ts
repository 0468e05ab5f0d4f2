/** Networks in fp16, int8 and int4, against the golden tensors and the shipped model in fp32; giving memory back. */

import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { afterAll, describe, expect, it, test } from 'vitest';
import { load } from '../../src/index.node.ts';
import { bindWeights, compileBound } from '../../src/models/bind.ts';
import { relativeBuckets, t5Segment } from '../../src/models/t5.ts';
import { loadClip, loadT5 } from '../../src/models/text-encoders.ts';
import { loadTransformer } from '../../src/models/transformer.ts';
import { partsToConvert } from '../../src/pipeline/precision.ts';
import type { FloatTensor, TensorData } from '../../src/tensor/index.ts';
import type { Checkpoint } from '../../src/weights/checkpoint.ts';
import { PRECISIONS, type Precision } from '../../src/weights/convert.ts';
import { convertParts } from '../../src/weights/converted.node.ts';
import { golden, readGolden } from '../support/golden.ts';
import { goldenCheckpoint } from '../support/models.ts';
import { cpu, maxDifference } from '../support/run.ts';

const folder = await mkdtemp(join(tmpdir(), 'mmditx-precision-'));
const closing: (() => Promise<void>)[] = [];
afterAll(async () => {
  await Promise.all(closing.map((close) => close()));
  await rm(folder, { recursive: true });
});

const original = await goldenCheckpoint();

async function goldenIn(precision: Precision): Promise<Checkpoint> {
  const parts = partsToConvert(original, precision);
  const { checkpoint, close } = await convertParts(original, parts, precision, { folder });
  closing.push(close);
  return checkpoint;
}

/** |a - b| / |b| */
function relativeError(a: FloatTensor, b: FloatTensor): number {
  expect(a.shape).toEqual(b.shape);
  const squares = (values: Float32Array) => values.reduce((sum, value) => sum + value ** 2, 0);
  return Math.sqrt(squares(a.data.map((value, i) => value - b.data[i]!)) / squares(b.data));
}

/** Most that results may differ from the golden tensors', and least where weights are rounded. */
const bounds = { fp32: [0, 1e-5], fp16: [0, 1e-5], int8: [1e-4, 0.03], int4: [1e-3, 0.3] } as const;

describe.each(PRECISIONS)('the golden model in %s', async (precision) => {
  const { parts } = await goldenIn(precision);
  const [least, most] = bounds[precision];
  const options = { expandWeights: precision === 'fp32' };
  const expectClose = (actual: FloatTensor, expected: FloatTensor) => {
    const error = relativeError(actual, expected);
    expect(error).toBeGreaterThanOrEqual(least);
    expect(error).toBeLessThan(most);
  };

  it.each(['A', 'B', 'C', 'D'])('predicts about the velocity of case %s', async (name) => {
    const tensors = readGolden('mmdit');
    const get = (key: string) => golden(tensors, `${name}.${key}`) as FloatTensor;
    const transformer = loadTransformer(cpu, parts.transformer!, options);
    const pass = { context: get('in.context'), pooled: get('in.pooled') };
    const [velocity] = await transformer.velocities(get('in.latent'), get('in.timestep').data, [pass]);
    await transformer.dispose();
    expectClose(velocity!, get('out'));
  });

  it('encodes about the same text', async () => {
    const tensors = readGolden('text');
    const get = (key: string) => golden(tensors, key) as FloatTensor;
    for (const [key, part] of [
      ['clip_l', parts.clipL!],
      ['clip_g', parts.clipG!],
    ] as const) {
      const encoder = loadClip(cpu, part, options);
      const { hidden, pooled } = await encoder.encode(get(`ids.${key}`));
      await encoder.dispose();
      expectClose(hidden, get(`${key}.hidden_penultimate`));
      expectClose(pooled, get(`${key}.pooled`));
    }
    const t5 = loadT5(cpu, parts.t5!, options);
    expectClose(await t5.encode(get('ids.t5_77')), get('t5.out_77'));
    await t5.dispose();
  });
});

describe('encoders that give their memory back', async () => {
  const { parts } = original;
  const tensors = readGolden('text');

  it.each(['clipL', 'clipG'] as const)('%s gives the same, each time', async (part) => {
    const ids = golden(tensors, part === 'clipL' ? 'ids.clip_l' : 'ids.clip_g');
    const [kept, released] = [loadClip(cpu, parts[part]!), loadClip(cpu, parts[part]!, { release: true })];
    const expected = await kept.encode(ids);
    for (const result of [await released.encode(ids), await released.encode(ids)]) {
      expect(maxDifference(result.hidden, expected.hidden)).toBe(0);
      expect(maxDifference(result.pooled, expected.pooled)).toBe(0);
    }
    const both = await Promise.all([released.encode(ids), released.encode(ids)]);
    expect(both.map(({ hidden }) => maxDifference(hidden, expected.hidden))).toEqual([0, 0]);
    await kept.dispose();
  });

  // Products with weights where they are mapped add up in another order.
  it('T5 gives the same up to rounding, each time', async () => {
    const ids = golden(tensors, 'ids.t5_77');
    const [kept, released] = [loadT5(cpu, parts.t5!), loadT5(cpu, parts.t5!, { release: true })];
    const expected = await kept.encode(ids);
    for (let i = 0; i < 2; i++) expect(maxDifference(await released.encode(ids), expected)).toBeLessThan(1e-5);
    await kept.dispose();
  });

  it('T5 in pieces gives the same as in one', async () => {
    const { config } = parts.t5!;
    const ids = golden(tensors, 'ids.t5_77');
    const buckets = relativeBuckets(77, config);
    const run = async (ends: readonly number[]) => {
      let flow: Record<string, TensorData> = { ids };
      for (const [i, end] of ends.entries()) {
        const bound = bindWeights(parts.t5!, { packWeights: false });
        const segment = await compileBound(cpu, t5Segment(config, bound.weights, ends[i - 1] ?? 0, end), bound);
        flow = await segment.run({ ...flow, buckets });
        await segment.dispose();
      }
      return flow.hidden as FloatTensor;
    };
    expect(config.layers).toBe(3);
    const whole = await run([3]);
    expect(maxDifference(await run([1, 2, 3]), whole)).toBe(0);
    expect(maxDifference(await run([2, 3]), whole)).toBe(0);
  });
});

test('the shipped model in int8 draws what it draws in fp32, to 30 dB', async () => {
  const SMALL = resolve('models/small/mmditx-small.safetensors');
  const prompts = ['3d fox on a teal background'];
  const draw = async (precision: Precision) => {
    const sd = await load(SMALL, { device: 'cpu', threads: 2, precision, cacheFolder: folder });
    try {
      const pictures: Uint8Array[] = [];
      for (const [seed, prompt] of prompts.entries()) {
        const [image] = await sd.generate({ prompt, seed, steps: 28, cfg: 4 });
        pictures.push(image!.data);
      }
      return pictures;
    } finally {
      await sd.dispose();
    }
  };
  const exact = await draw('fp32');
  const psnr = (a: Uint8Array, b: Uint8Array) =>
    10 * Math.log10(255 ** 2 / (a.reduce((sum, value, i) => sum + (value - b[i]!) ** 2, 0) / a.length));
  for (const [precision, least] of [
    ['fp16', 60],
    ['int8', 30],
  ] as const) {
    for (const [i, picture] of (await draw(precision)).entries()) {
      expect(psnr(picture, exact[i]!), `${precision}, ${prompts[i]}`).toBeGreaterThan(least);
    }
  }
});
