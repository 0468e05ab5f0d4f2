import { describe, expect, it } from 'vitest';
import { tensorFromImage } from '../../src/image/image.ts';
import { load, SMALL_MODEL } from '../../src/index.node.ts';
import { latentOf, loadAutoencoder } from '../../src/models/autoencoder.ts';
import { blendWeights, inTiles, tileSpans } from '../../src/models/tiles.ts';
import { type FloatTensor, floats } from '../../src/tensor/data.ts';
import { openCheckpoint } from '../../src/weights/checkpoint.ts';
import { fileSource } from '../../src/weights/files.node.ts';
import { goldenCheckpoint } from '../support/models.ts';
import { cpu, maxDifference } from '../support/run.ts';

describe('spans of tiles', () => {
  it.each([
    [64, 64, 6],
    [65, 64, 6],
    [128, 64, 6],
    [129, 64, 6],
    [1000, 64, 6],
    [97, 16, 8],
    [7, 5, 4],
  ])('cover %i with tiles of at most %i that share at least %i', (size, tile, overlap) => {
    const spans = tileSpans(size, { size: tile, overlap });
    expect(spans[0]!.start).toBe(0);
    expect(spans.at(-1)!.end).toBe(size);
    for (const [i, { start, end }] of spans.entries()) {
      expect(end - start).toBeLessThanOrEqual(tile);
      if (i > 0) expect(spans[i - 1]!.end - start).toBeGreaterThanOrEqual(overlap);
    }
  });

  it('refuse tiles that never advance', () => {
    expect(() => tileSpans(100, { size: 8, overlap: 8 })).toThrow(RangeError);
  });

  it('have weights that sum to 1 everywhere', () => {
    const spans = tileSpans(203, { size: 40, overlap: 12 });
    const sums = new Float64Array(203);
    for (const [i, weights] of blendWeights(spans).entries()) {
      for (const [x, weight] of weights.entries()) sums[spans[i]!.start + x]! += weight;
    }
    for (const sum of sums) expect(sum).toBeCloseTo(1, 12);
  });
});

const ramp = (shape: readonly number[]) =>
  floats(
    shape,
    Float32Array.from({ length: shape.reduce((a, b) => a * b) }, (_, i) => Math.sin(i)),
  );

describe('work in tiles', () => {
  const tile = { size: 8, overlap: 2 };

  it('gives what it gives at once where pixels do not see each other', async () => {
    const input = ramp([2, 3, 21, 34]);
    const square = async (x: FloatTensor) =>
      floats(
        x.shape,
        x.data.map((value) => value * value),
      );
    expect(maxDifference(await inTiles(input, { tile }, square), await square(input))).toBeLessThan(1e-6);
  });

  it('places results of another scale', async () => {
    const double = async ({ shape: [batch, channels, height, width], data }: FloatTensor) => {
      const out = floats([batch!, channels!, 2 * height!, 2 * width!], new Float32Array(4 * data.length));
      for (let i = 0; i < out.data.length; i++) {
        const [x, y, plane] = [
          i % (2 * width!),
          Math.floor(i / (2 * width!)) % (2 * height!),
          Math.floor(i / (4 * width! * height!)),
        ];
        out.data[i] = data[(plane * height! + (y >> 1)) * width! + (x >> 1)]!;
      }
      return out;
    };
    const input = ramp([1, 2, 19, 12]);
    expect(maxDifference(await inTiles(input, { tile }, double), await double(input))).toBeLessThan(1e-6);
  });

  it('stops between two tiles', async () => {
    const stop = new AbortController();
    let tiles = 0;
    const work = async (x: FloatTensor) => {
      if (++tiles === 2) stop.abort(new Error('enough'));
      return x;
    };
    await expect(inTiles(ramp([1, 1, 40, 40]), { tile, signal: stop.signal }, work)).rejects.toThrow('enough');
    expect(tiles).toBe(2);
  });
});

describe('the VAE in tiles', () => {
  it('does a picture no larger than a tile at once, bit for bit', async () => {
    const { parts } = await goldenCheckpoint('tiny_sd35');
    const vae = loadAutoencoder(cpu, parts.vae!);
    const latent = ramp([1, 16, 8, 8]);
    const whole = await vae.decode(latent, { tile: 'off' });
    expect((await vae.decode(latent, { tile: { size: 64, overlap: 16 } })).data).toEqual(whole.data);
    await vae.dispose();
  });

  it('refuses tiles that are no multiples of its unit', async () => {
    const { parts } = await goldenCheckpoint('tiny_sd35');
    const vae = loadAutoencoder(cpu, parts.vae!);
    await expect(vae.decode(ramp([1, 16, 16, 16]), { tile: { size: 100, overlap: 16 } })).rejects.toThrow(
      /Tiles of 100 pixels that overlap by 16 cannot be/,
    );
  });

  it('differs from a picture done at once by no more than 40 dB', async () => {
    const sd = await load(SMALL_MODEL, { device: 'cpu' });
    const [image] = await sd.generate({
      prompt: 'glossy fox on a teal background',
      seed: 1,
      steps: 12,
      width: 256,
      height: 256,
    });
    await sd.dispose();
    const source = await fileSource(SMALL_MODEL);
    const { parts } = await openCheckpoint([source]);
    const vae = loadAutoencoder(cpu, parts.vae!);
    const picture = tensorFromImage(image!);
    const tile = { size: 128, overlap: 48 };
    const latent = latentOf(await vae.encode(picture, { tile: 'off' }), vae.config);
    const whole = await vae.decode(latent, { tile: 'off' });
    expect(psnr(await vae.decode(latent, { tile }), whole)).toBeGreaterThan(40);
    const tiled = latentOf(await vae.encode(picture, { tile }), vae.config);
    expect(psnr(await vae.decode(tiled, { tile: 'off' }), whole)).toBeGreaterThan(40);
    await vae.dispose();
    await source.close();
  });
});

/** Of pictures in [-1, 1], in dB. */
function psnr({ data }: FloatTensor, reference: FloatTensor): number {
  const error = data.reduce((sum, value, i) => sum + (value - reference.data[i]!) ** 2, 0) / data.length;
  return 10 * Math.log10(4 / error);
}
