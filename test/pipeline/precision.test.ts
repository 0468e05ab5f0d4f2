import { describe, expect, it } from 'vitest';
import { CLIP_G, CLIP_L, SD3_VAE, SD35_MEDIUM_TRANSFORMER, T5_XXL } from '../../src/models/config.ts';
import { choosePrecision, neededBytes, partsToConvert, weightBytes } from '../../src/pipeline/precision.ts';
import { openCheckpoint } from '../../src/weights/checkpoint.ts';
import { clipTensors, t5Tensors, transformerTensors, vaeTensors } from '../../src/weights/expected.ts';
import { goldenCheckpoint } from '../support/models.ts';
import { prefixed, shapesSource } from '../weights/sources.ts';

const GIB = 2 ** 30;

/** The released model, sizes alone. */
const medium = await openCheckpoint([
  shapesSource(
    new Map([
      ...prefixed('model.diffusion_model.', transformerTensors(SD35_MEDIUM_TRANSFORMER)),
      ...prefixed('first_stage_model.', vaeTensors(SD3_VAE)),
    ]),
    'sd3.5_medium.safetensors',
  ),
  shapesSource(clipTensors(CLIP_L), 'clip_l.safetensors'),
  shapesSource(clipTensors(CLIP_G), 'clip_g.safetensors'),
  shapesSource(t5Tensors(T5_XXL), 't5xxl_fp16.safetensors'),
]);
const small = await goldenCheckpoint();

const choose = (gibibytes: number, device: 'cpu' | 'webgpu' = 'cpu') =>
  choosePrecision(medium, { device, freeBytes: gibibytes * GIB });

describe('the size of Stable Diffusion 3.5 Medium', () => {
  // 2.47 billion parameters, of which 0.76 modulate and 0.23 are positions; T5 has 4.76 billion.
  it.each([
    ['fp32', 9.87, 19.05],
    ['fp16', 4.94, 9.52],
    ['int8', 2.5, 5.0],
    ['int4', 2.15, 3.2],
  ] as const)('in %s is about %d GB, its T5 %d GB', (precision, transformer, t5) => {
    const sizes = weightBytes(medium, precision);
    expect(sizes.get('transformer')! / 1e9 / transformer).toBeGreaterThan(0.88);
    expect(sizes.get('transformer')! / 1e9 / transformer).toBeLessThan(1.12);
    expect(sizes.get('t5')! / 1e9 / t5).toBeGreaterThan(0.88);
    expect(sizes.get('t5')! / 1e9 / t5).toBeLessThan(1.12);
  });

  it('needs room for its largest network but T5, which runs in pieces', () => {
    const largest = weightBytes(medium, 'int8').get('transformer')!;
    expect(neededBytes(medium, 'int8')).toBeGreaterThan(largest);
    expect(neededBytes(medium, 'int8')).toBeLessThan(weightBytes(medium, 'int8').get('t5')!);
  });
});

describe('choosePrecision', () => {
  it('takes fp32 for a small model, however little memory is free', () => {
    for (const device of ['cpu', 'webgpu'] as const) {
      const choice = choosePrecision(small, { device, freeBytes: GIB });
      expect(choice.precision).toBe('fp32');
      expect(choice.reason).toBeUndefined();
    }
  });

  it('keeps all networks of a small model where they fit', () => {
    expect(choosePrecision(small, { device: 'cpu', freeBytes: 16 * GIB }).release).toBe(false);
  });

  it('takes int8 for the released model on a processor and says why', () => {
    const choice = choose(64);
    expect(choice).toMatchObject({ precision: 'int8', release: false });
    expect(choice.reason).toMatch(/^int8 \(8-bit weights\): [78]\.\d GiB of weights, 64\.0 GiB of memory free$/);
  });

  it('lets networks take turns where they do not fit together', () => {
    const choice = choose(8);
    expect(choice).toMatchObject({ precision: 'int8', release: true });
    expect(choice.reason).toMatch(/one network at a time$/);
  });

  it('takes int4 where int8 does not fit', () => {
    const between = (neededBytes(medium, 'int8') + neededBytes(medium, 'int4')) / 2 / GIB;
    expect(choose(between)).toMatchObject({ precision: 'int4', release: true });
  });

  it('says what is needed and what is free where nothing fits', () => {
    expect(() => choose(2)).toThrow(
      /^The model needs about 3\.\d GiB of memory in int4 and 2\.0 GiB is free; close other programs\.$/,
    );
  });

  it('takes the stored 16 bits on a graphics device', () => {
    expect(choose(64, 'webgpu').precision).toBe('fp16');
  });

  it.each(['fp32', 'fp16', 'int8', 'int4'] as const)('keeps %s where the user wants it', (wanted) => {
    for (const device of ['cpu', 'webgpu'] as const) {
      expect(choosePrecision(medium, { wanted, device, freeBytes: 64 * GIB }).precision).toBe(wanted);
      expect(choosePrecision(small, { wanted, device, freeBytes: 64 * GIB }).precision).toBe(wanted);
    }
  });

  it('refuses what the user wants where it does not fit, with a remedy', () => {
    const wanted = { wanted: 'fp32', device: 'cpu', freeBytes: 8 * GIB } as const;
    expect(() => choosePrecision(medium, wanted)).toThrow(
      /about 1\d\.\d GiB of memory in fp32 and 8\.0 GiB is free; choose a smaller --precision or close/,
    );
  });
});

describe('partsToConvert', () => {
  it.each([
    ['fp32', []],
    ['fp16', []],
    ['int8', ['transformer', 'clipL', 'clipG', 't5']],
    ['int4', ['transformer', 'clipL', 'clipG', 't5']],
  ] as const)('for %s', (precision, parts) => {
    expect(partsToConvert(medium, precision).sort()).toEqual([...parts].sort());
  });
});
