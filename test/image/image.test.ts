import { describe, expect, test } from 'vitest';
import {
  imageFromTensor,
  imageHash,
  latentMask,
  maskFromImage,
  type RgbImage,
  shrinkImage,
  tensorFromImage,
} from '../../src/image/image.ts';
import { type FloatTensor, floats } from '../../src/tensor/data.ts';
import { golden, maxDifference, readGolden } from '../support/golden.ts';

const picture = (width: number, height: number, pixels: readonly number[][]): RgbImage => ({
  width,
  height,
  data: Uint8Array.from(pixels.flat()),
});

describe('pictures and tensors', () => {
  const vae = readGolden('vae');

  test.each([
    ['A', 'truncate', 'A.u8_trunc'],
    ['A', 'nearest-even', 'A.u8_round'],
    ['B', 'truncate', 'B.u8_trunc'],
    ['B', 'nearest-even', 'B.u8_round'],
  ] as const)('%s decoded, %s, equals the references', (set, rounding, name) => {
    const expected = golden(vae, name);
    const images = imageFromTensor(golden(vae, `${set}.decoded`) as FloatTensor, { rounding });
    expect(images.map(({ height, width }) => [height, width, 3])).toEqual(
      images.map(() => [...expected.shape.slice(1)]),
    );
    expect(
      maxDifference(
        images.flatMap(({ data }) => [...data]),
        expected.data,
      ),
    ).toBe(0);
  });

  test('truncation is what happens without an option, and the two roundings differ', () => {
    const tensor = floats([1, 3, 1, 1], [0, 0.5, -0.2]);
    expect([...imageFromTensor(tensor)[0]!.data]).toEqual([127, 191, 102]);
    // 127.5 is halfway and goes to the even 128.
    expect([...imageFromTensor(tensor, { rounding: 'nearest-even' })[0]!.data]).toEqual([128, 191, 102]);
  });

  test('values outside -1..1 are clamped, infinities too, and NaN is an error', () => {
    const wild = floats([1, 3, 1, 1], [-7, 1.5, Number.POSITIVE_INFINITY]);
    expect([...imageFromTensor(wild)[0]!.data]).toEqual([0, 255, 255]);
    expect(() => imageFromTensor(floats([1, 3, 1, 1], [0, Number.NaN, 0]))).toThrow(
      expect.objectContaining({ code: 'not-finite' }),
    );
  });

  test('a picture becomes the tensor the references make of it', () => {
    const expected = golden(vae, 'A.in.image') as FloatTensor;
    const [image] = imageFromTensor(expected, { rounding: 'nearest-even' });
    const tensor = tensorFromImage(image!);
    expect(tensor.shape).toEqual(expected.shape);
    expect(maxDifference(tensor.data, expected.data)).toBeLessThan(1.2e-7);
  });

  test('every level survives the way to a tensor and back', () => {
    const levels = picture(
      256,
      1,
      Array.from({ length: 256 }, (_, i) => [i, 255 - i, i]),
    );
    expect(imageFromTensor(tensorFromImage(levels), { rounding: 'nearest-even' })[0]).toEqual(levels);
  });

  test('a tensor of another shape is refused in words', () => {
    expect(() => imageFromTensor(floats([1, 4, 1, 1], [0, 0, 0, 0]))).toThrow('[1, 4, 1, 1]');
  });
});

describe('masks', () => {
  test('luminance: white is repainted, black kept, colours by their luma', () => {
    const mask = maskFromImage(
      picture(4, 1, [
        [255, 255, 255],
        [0, 0, 0],
        [255, 0, 0],
        [0, 255, 0],
      ]),
    );
    expect(mask.shape).toEqual([1, 1, 1, 4]);
    // Pillow: (255, 0, 0) -> 76, (0, 255, 0) -> 150.
    expect(maxDifference(mask.data, [1, 0, 76 / 255, 150 / 255])).toBeLessThan(1e-7);
  });

  test('alpha: transparent is repainted; a picture without alpha keeps everything', () => {
    const image = picture(2, 1, [
      [9, 9, 9],
      [9, 9, 9],
    ]);
    const mask = maskFromImage({ ...image, alpha: Uint8Array.of(0, 255) }, { channel: 'alpha' });
    expect([...mask.data]).toEqual([1, 0]);
    expect([...maskFromImage(image, { channel: 'alpha' }).data]).toEqual([0, 0]);
  });

  test('a mask 8 times the latent is sampled at the middle 2 x 2 pixels of each block', () => {
    const values = new Float32Array(16 * 16);
    // In the block at row 0, column 1: one of the four middle pixels, and a corner pixel that must not count.
    values[3 * 16 + 8 + 3] = 1;
    values[0 * 16 + 8] = 1;
    const reduced = latentMask(floats([1, 1, 16, 16], values), 2, 2);
    expect(reduced.shape).toEqual([1, 1, 2, 2]);
    expect([...reduced.data]).toEqual([0, 0.25, 0, 0]);
  });

  test('a mask of any other size is stretched as torch does it (bilinear, align_corners false)', () => {
    // torch.nn.functional.interpolate(tensor([[[[0., 1., 4.]]]]), size=(1, 2), mode='bilinear') -> [[0.25, 3.25]]
    expect([...latentMask(floats([1, 1, 1, 3], [0, 1, 4]), 1, 2).data]).toEqual([0.25, 3.25]);
    // ... size=(1, 6): edges repeat the outermost value.
    expect([...latentMask(floats([1, 1, 1, 3], [0, 1, 4]), 1, 6).data]).toEqual([0, 0.25, 0.75, 1.75, 3.25, 4]);
    expect([...latentMask(floats([2, 1, 1, 1], [0.5, 1]), 1, 2).data]).toEqual([0.5, 0.5, 1, 1]);
  });
});

describe('small views and hashes', () => {
  test('shrinking averages all pixels a new one covers', () => {
    const image = picture(4, 2, [
      [0, 0, 0],
      [100, 0, 0],
      [9, 9, 9],
      [9, 9, 9],
      [0, 40, 0],
      [100, 0, 8],
      [9, 9, 9],
      [9, 9, 9],
    ]);
    expect(shrinkImage(image, 2, 1)).toEqual(
      picture(2, 1, [
        [50, 10, 2],
        [9, 9, 9],
      ]),
    );
    expect(shrinkImage(image, 4, 2)).toEqual(image);
    expect(
      shrinkImage(
        picture(3, 1, [
          [0, 0, 0],
          [60, 0, 0],
          [120, 0, 0],
        ]),
        2,
        1,
      ).data[0],
    ).toBe(30);
  });

  test('a hash depends on pixels and shape', async () => {
    const pixels = [
      [1, 2, 3],
      [4, 5, 6],
    ];
    const hash = await imageHash(picture(2, 1, pixels));
    expect(hash).toBe('562f567f19e0af6f51b8a5ad9b2746b8a5f25051cc298eccdbc62ece11f7ab30');
    expect(await imageHash(picture(1, 2, pixels))).not.toBe(hash);
    expect(
      await imageHash(
        picture(2, 1, [
          [1, 2, 3],
          [4, 5, 7],
        ]),
      ),
    ).not.toBe(hash);
  });
});
