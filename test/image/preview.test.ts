import { describe, expect, test } from 'vitest';
import { fitPreviewFactors, previewFactorsSchema, previewImage } from '../../src/image/preview.ts';
import { torchGenerator } from '../../src/sampling/noise.ts';
import { type FloatTensor, floats } from '../../src/tensor/data.ts';

const weights = [
  [0.3, -0.1, 0.05],
  [0, 0.25, -0.2],
  [-0.15, 0.1, 0.3],
  [0.02, 0.04, -0.06],
];
const bias = [0.1, -0.2, 0.05];

/** A decoder that is linear in each latent pixel, with some texture in its blocks that averages to nothing. */
function decoder(scale: number, curve: (value: number) => number = (value) => value) {
  return async (latent: FloatTensor) => {
    const [batch, channels, height, width] = latent.shape as [number, number, number, number];
    const picture = floats(
      [batch, 3, height * scale, width * scale],
      new Float32Array(batch * 3 * height * width * scale * scale),
    );
    for (let i = 0; i < picture.data.length; i++) {
      const x = i % (width * scale);
      const y = Math.floor(i / (width * scale)) % (height * scale);
      const plane = Math.floor(i / (width * height * scale * scale));
      const at = Math.floor(y / scale) * width + Math.floor(x / scale);
      let value = bias[plane % 3]!;
      for (let c = 0; c < channels; c++) {
        value += weights[c]![plane % 3]! * latent.data[(Math.floor(plane / 3) * channels + c) * height * width + at]!;
      }
      picture.data[i] = curve(value) + (x % 2 ? 0.01 : -0.01);
    }
    return picture;
  };
}

const expectNear = (actual: readonly number[], expected: readonly number[], tolerance: number) =>
  actual.forEach((value, i) => {
    expect(Math.abs(value - expected[i]!)).toBeLessThan(tolerance);
  });

describe('preview factors', () => {
  test.each([2, 8])('of a linear decoder are the decoder (scale %i)', async (scale) => {
    const factors = await fitPreviewFactors(decoder(scale), 4);
    factors.weights.forEach((row, c) => {
      expectNear(row, weights[c]!, 1e-5);
    });
    expectNear(factors.bias, bias, 1e-5);
  });

  test('are the same each time, and another seed changes them only a little', async () => {
    const curved = decoder(2, Math.tanh);
    const factors = await fitPreviewFactors(curved, 4);
    expect(await fitPreviewFactors(curved, 4)).toEqual(factors);
    const other = await fitPreviewFactors(curved, 4, { seed: 5 });
    expect(other).not.toEqual(factors);
    other.weights.forEach((row, c) => {
      expectNear(row, factors.weights[c]!, 0.02);
    });
  });

  test('explain most of a decoder that is not linear', async () => {
    const curved = decoder(2, Math.tanh);
    const factors = await fitPreviewFactors(curved, 4);
    const latent = floats([1, 4, 8, 8], torchGenerator(99).normal(4 * 64));
    const expected = await curved(latent);
    const [preview] = previewImage(latent, factors);
    let worst = 0;
    for (let y = 0; y < 8; y++) {
      for (let x = 0; x < 8; x++) {
        const level = ((expected.data[2 * y * 16 + 2 * x]! + 1) / 2) * 255;
        worst = Math.max(worst, Math.abs(preview!.data[3 * (8 * y + x)]! - level));
      }
    }
    expect(worst).toBeLessThan(25);
  });

  test('can be fitted on given latents, even where a channel never changes', async () => {
    const values = torchGenerator(3).normal(2 * 4 * 36);
    values.fill(0.5, 36, 72);
    values.fill(0.5, 4 * 36 + 36, 4 * 36 + 72);
    const latents = [floats([2, 4, 6, 6], values)];
    const factors = await fitPreviewFactors(decoder(4), 4, { latents });
    expectNear(factors.weights[0]!, weights[0]!, 1e-5);
    expectNear(factors.weights[3]!, weights[3]!, 1e-5);
    expect(factors.weights.flat().every(Number.isFinite)).toBe(true);
  });

  test('survive JSON', async () => {
    const factors = await fitPreviewFactors(decoder(2), 4);
    expect(previewFactorsSchema.parse(JSON.parse(JSON.stringify(factors)))).toEqual(factors);
  });

  test('a decoder whose picture is no multiple of the latent is refused', async () => {
    await expect(fitPreviewFactors(async () => floats([1, 3, 5, 5], new Float32Array(75)), 4)).rejects.toThrow(
      '[1, 3, 5, 5]',
    );
  });
});

describe('preview pictures', () => {
  test('have the size of the latent, one for each of the batch', () => {
    const latent = floats([2, 1, 1, 2], [0, 1, -1, 9]);
    const images = previewImage(latent, { weights: [[1, 0, 0.5]], bias: [0, 0, -1] });
    expect(images).toEqual([
      { width: 2, height: 1, data: Uint8Array.of(127, 127, 0, 255, 127, 63) },
      { width: 2, height: 1, data: Uint8Array.of(0, 127, 0, 255, 127, 255) },
    ]);
  });

  test('need factors for as many channels', () => {
    expect(() => previewImage(floats([1, 2, 1, 1], [0, 0]), { weights: [[1, 1, 1]], bias: [0, 0, 0] })).toThrow(
      '1 channels do not fit',
    );
  });
});
