import { existsSync } from 'node:fs';
import { resolve } from 'node:path';
import sharp from 'sharp';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { tensorFromImage } from '../../src/image/image.ts';
import { type Autoencoder, latentOf, loadAutoencoder } from '../../src/models/autoencoder.ts';
import { bindWeights } from '../../src/models/bind.ts';
import { inTiles } from '../../src/models/tiles.ts';
import {
  decode,
  decodeCoarse,
  decodeFine,
  decoderFeaturesInput,
  encodeCoarse,
  encodeFine,
  encodeMoments,
  encoderFeaturesInput,
  encodeStatistics,
  imageInput,
  latentInput,
  statisticsInput,
} from '../../src/models/vae.ts';
import type { Runtime } from '../../src/runtime/runtime.ts';
import { inOrder } from '../../src/tensor/gradient.ts';
import { type FloatTensor, floats, type Tensor, type TensorData } from '../../src/tensor/index.ts';
import { openCheckpoint } from '../../src/weights/checkpoint.ts';
import { fileSource } from '../../src/weights/files.node.ts';
import { golden, readGolden } from '../support/golden.ts';
import { goldenCheckpoint } from '../support/models.ts';
import { cpu, maxDifference, randomFloats } from '../support/run.ts';

const { parts } = await goldenCheckpoint();
const part = parts.vae!;
const { config } = part;
const tensors = readGolden('vae');
const get = (name: string) => golden(tensors, name) as FloatTensor;

async function evaluate(
  record: (weights: ReturnType<typeof bindWeights>['weights']) => Record<string, Tensor>,
  inputs: Record<string, TensorData>,
): Promise<Record<string, FloatTensor>> {
  const bound = bindWeights(part);
  const executable = await cpu.compile({ outputs: record(bound.weights) }, bound);
  const results = await executable.run(inputs);
  await executable.dispose();
  return results as Record<string, FloatTensor>;
}

/** Mean and variance of every group before each group norm of a whole network, in the order of the norms. */
async function trueStatistics(
  record: (weights: ReturnType<typeof bindWeights>['weights']) => Tensor,
  inputs: Record<string, TensorData>,
): Promise<number[][][]> {
  const results = await evaluate((weights) => {
    const norms = inOrder([record(weights)]).filter(({ operation }) => operation.name === 'InstanceNormalization');
    return Object.fromEntries(norms.map(({ inputs: [grouped] }, i) => [String(i), grouped!]));
  }, inputs);
  return Object.keys(results).map((_, i) => {
    const { shape, data } = results[i]!;
    const [, groups, size] = shape as [number, number, number];
    return Array.from({ length: groups }, (_, group) => {
      const values = [...data.subarray(group * size, (group + 1) * size)];
      const mean = values.reduce((sum, value) => sum + value, 0) / size;
      return [mean, values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / size];
    });
  });
}

/** The statistics of some norms as the parts of the network take them. */
function packed(norms: readonly number[][][]): FloatTensor {
  const values = Array.from({ length: config.groups }, (_, group) => norms.flatMap((norm) => norm[group]!));
  return floats([1, config.groups, 2 * norms.length], values.flat());
}

describe('the parts of the VAE, with the true statistics, give what the reference gives', () => {
  const levels = config.multipliers.length;
  for (let level = 1; level < levels; level++) {
    it(`the decoder cut at level ${level}`, async () => {
      const latent = get('A.in.latent_scaled');
      const norms = await trueStatistics((weights) => decode(config, weights, latentInput(config)), { latent });
      const { features } = await evaluate(
        (weights) => ({ features: decodeCoarse(config, weights, latentInput(config), level) }),
        { latent },
      );
      const inputs = [decoderFeaturesInput(config, level), statisticsInput(config)] as const;
      const { image } = await evaluate((weights) => ({ image: decodeFine(config, weights, ...inputs, level) }), {
        features: features!,
        // Two norms a block, and the last of all.
        statistics: packed(norms.slice(-(2 * (config.resBlocks + 1) * level + 1))),
      });
      expect(maxDifference(image!, get('A.decoded'))).toBeLessThan(5e-5);
    });

    it(`the encoder cut at level ${level}`, async () => {
      const image = get('A.in.image');
      const norms = await trueStatistics((weights) => encodeMoments(config, weights, imageInput(config)), { image });
      const { statistics } = await evaluate(
        (weights) => ({ statistics: encodeStatistics(config, weights, imageInput(config), level) }),
        { image },
      );
      expect(maxDifference(statistics!, packed(norms.slice(0, 2 * config.resBlocks * level)))).toBeLessThan(1e-5);
      const inputs = [imageInput(config), statisticsInput(config)] as const;
      const { features } = await evaluate((weights) => ({ features: encodeFine(config, weights, ...inputs, level) }), {
        image,
        statistics: statistics!,
      });
      const { moments } = await evaluate(
        (weights) => ({ moments: encodeCoarse(config, weights, encoderFeaturesInput(config, level), level) }),
        { features: features! },
      );
      expect(maxDifference(moments!, get('A.moments'))).toBeLessThan(5e-5);
    });
  }
});

/** Waves of several lengths whose strength and level change from one side to the other: no two tiles are alike. */
function scene(batch: number, height: number, width: number): FloatTensor {
  const data = Float32Array.from({ length: 3 * batch * height * width }, (_, i) => {
    const [x, y, channel] = [i % width, Math.floor(i / width) % height, Math.floor(i / (width * height))];
    const place = x / width + y / height;
    return 0.6 * (place - 1) + 0.2 * place * Math.sin(x / 3 + channel) * Math.cos(y / 5 - channel);
  });
  return floats([batch, 3, height, width], data);
}

/** Peak signal to noise ratio of pictures in [-1, 1], in decibels. */
function psnr(a: FloatTensor, b: FloatTensor): number {
  const error = a.data.reduce((sum, value, i) => sum + (value - b.data[i]!) ** 2, 0) / a.data.length;
  return 10 * Math.log10(4 / error);
}

describe('a picture of more than one tile', () => {
  const tile = { size: 64, overlap: 24 };
  let vae: Autoencoder;
  beforeAll(() => {
    vae = loadAutoencoder(cpu, part);
  });
  afterAll(() => vae.dispose());
  const latent = async (image: FloatTensor) => latentOf(await vae.encode(image, { tile: 'off' }), config);

  // Random weights make the most of every difference; the next suite has the trained ones.
  it('decodes much nearer to what it is at once than tiles that go by their own statistics', async () => {
    const z = await latent(scene(1, 120, 184));
    const whole = await vae.decode(z, { tile: 'off' });
    const tiled = await vae.decode(z, { tile });
    const apart = await inTiles(z, { tile: { size: 8, overlap: 3 } }, (piece) => vae.decode(piece, { tile: 'off' }));
    expect(tiled.shape).toEqual(whole.shape);
    expect(psnr(tiled, whole)).toBeGreaterThan(psnr(apart, whole) + 10);
  });

  it('encodes much nearer, too', async () => {
    const image = randomFloats([1, 3, 120, 184]);
    const whole = await vae.encode(image, { tile: 'off' });
    const tiled = await vae.encode(image, { tile });
    const cut = { tile: { size: 8, overlap: 3 }, unit: 8 };
    const apart = await inTiles(image, cut, (piece) => vae.encode(piece, { tile: 'off' }));
    expect(tiled.shape).toEqual(whole.shape);
    expect(psnr(tiled, whole)).toBeGreaterThan(psnr(apart, whole) + 10);
  });

  it('gives each picture of a batch what it gets alone', async () => {
    const images = scene(2, 72, 104);
    const z = await latent(images);
    const both = await vae.decode(z, { tile });
    const second = await vae.decode(floats([1, ...z.shape.slice(1)], z.data.slice(z.data.length / 2)), { tile });
    expect(both.shape).toEqual([2, 3, 72, 104]);
    expect(maxDifference(second, { data: both.data.slice(both.data.length / 2) })).toBe(0);
    const moments = await vae.encode(images, { tile });
    expect(moments.shape).toEqual([2, 2 * config.latentChannels, 9, 13]);
  });

  it('may be smaller than a tile along one side', async () => {
    const z = await latent(scene(1, 8, 136));
    expect(psnr(await vae.decode(z, { tile }), await vae.decode(z, { tile: 'off' }))).toBeGreaterThan(20);
  });

  it('stops between two tiles when it is aborted', async () => {
    const controller = new AbortController();
    let tiles = 0;
    const counting: Runtime = {
      ...cpu,
      async compile(program, options) {
        const executable = await cpu.compile(program, options);
        return {
          ...executable,
          async run(inputs, run) {
            const outputs = await executable.run(inputs, run);
            if (inputs.statistics && ++tiles === 2) controller.abort(new Error('enough'));
            return outputs;
          },
        };
      },
    };
    const counted = loadAutoencoder(counting, part);
    const z = randomFloats([1, config.latentChannels, 16, 16]);
    await expect(counted.decode(z, { tile, signal: controller.signal })).rejects.toThrow('enough');
    expect(tiles).toBe(2);
    await counted.dispose();
  });

  it('is decoded again after another was given up, and side by side with one', async () => {
    const z = randomFloats([1, config.latentChannels, 9, 12]);
    const signal = AbortSignal.abort(new Error('never mind'));
    const [first, second, third] = await Promise.allSettled([
      vae.decode(z, { tile }),
      vae.decode(z, { tile, signal }),
      vae.decode(z, { tile }),
    ]);
    expect(second.status).toBe('rejected');
    expect(first).toEqual(third);
    expect(first.status).toBe('fulfilled');
  });
});

const SMALL = resolve('models/small/mmditx-small.safetensors');
/** 64 pictures of 128 x 128 pixels that it drew. */
const SHEET = resolve('models/small/sheet/sheet.png');

describe.skipIf(!existsSync(SMALL))('the small model', () => {
  it('shows no seams: four of its pictures side by side, in tiles that end on others', async () => {
    const checkpoint = await openCheckpoint([await fileSource(SMALL)]);
    const vae = loadAutoencoder(cpu, checkpoint.parts.vae!);
    const four = { left: 256, top: 256, width: 256, height: 256 };
    const data = await sharp(SHEET).extract(four).removeAlpha().raw().toBuffer();
    const image = tensorFromImage({ ...four, data });
    const z = latentOf(await vae.encode(image, { tile: 'off' }), vae.config);
    const whole = await vae.decode(z, { tile: 'off' });
    const tiles = { tile: { size: 128, overlap: 32 } };
    expect(psnr(await vae.decode(z, tiles), whole)).toBeGreaterThan(40);
    const again = latentOf(await vae.encode(image, tiles), vae.config);
    expect(psnr(await vae.decode(again, { tile: 'off' }), whole)).toBeGreaterThan(40);
    await vae.dispose();
  });
});

describe('a picture of one tile', () => {
  it('is decoded and encoded as without tiles, to the last bit', async () => {
    const vae = loadAutoencoder(cpu, part);
    const image = scene(1, 64, 48);
    const moments = await vae.encode(image, { tile: 'off' });
    const z = latentOf(moments, config);
    const picture = await vae.decode(z, { tile: 'off' });
    for (const options of [{}, { tile: 'auto' }, { tile: { size: 64, overlap: 16 } }] as const) {
      expect(await vae.encode(image, options)).toEqual(moments);
      expect(await vae.decode(z, options)).toEqual(picture);
    }
    await vae.dispose();
  });
});

describe('tiles that cannot be', () => {
  it('are refused with what they may be', async () => {
    const vae = loadAutoencoder(cpu, part);
    const z = randomFloats([1, config.latentChannels, 9, 12]);
    for (const tile of [
      { size: 56, overlap: 8 },
      { size: 100, overlap: 8 },
      { size: 64, overlap: 40 },
      { size: 64, overlap: -8 },
      { size: 64, overlap: 4 },
      { size: Number.NaN, overlap: 0 },
    ]) {
      await expect(vae.decode(z, { tile })).rejects.toMatchObject({ code: 'bad-option' });
    }
    await expect(vae.decode(z, { tile: { size: 100, overlap: 8 } })).rejects.toThrow(
      'Tiles of 100 pixels that overlap by 8 cannot be; both must be multiples of 8, ' +
        'the size from 64 and the overlap up to half of it.',
    );
  });

  it('a picture whose sides do not divide is refused by its own size', async () => {
    const vae = loadAutoencoder(cpu, part);
    const image = randomFloats([1, 3, 132, 68]);
    await expect(vae.encode(image, { tile: { size: 64, overlap: 8 } })).rejects.toThrow('[1, 3, 132, 68]');
    await vae.dispose();
  });
});
