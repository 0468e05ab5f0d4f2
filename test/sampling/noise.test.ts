import { describe, expect, it } from 'vitest';
import { samplerNoise, type TorchGeneratorState, torchGenerator } from '../../src/sampling/noise.ts';
import { toFloat16, toFloat32 } from '../../src/tensor/data.ts';
import { golden, maxDifference, readGolden } from '../support/golden.ts';

const tensors = readGolden('rng');
const expected = (name: string) => golden(tensors, name);
const NORMAL_TOLERANCE = 2e-6;

describe('PyTorch CPU numbers', () => {
  it.each([
    ['randn.f32.seed0', 0],
    ['randn.f32.seed23', 23],
    ['randn.f32.seed42', 42],
    ['randn.f32.seed23_tail', 23],
    ['randn.f32.seed23_small', 23],
  ] as const)('%s', (name, seed) => {
    const { data } = expected(name);
    expect(maxDifference(torchGenerator(seed).normal(data.length), data)).toBeLessThanOrEqual(NORMAL_TOLERANCE);
  });

  it('randn.seq: long and short draws in turn, each short one leaving half a pair to the next', () => {
    const generator = torchGenerator(7);
    const drawn = [1, 3, 20, 5, 16, 2].flatMap((count) => [...generator.normal(count)]);
    expect(maxDifference(drawn, expected('randn.seq').data)).toBeLessThanOrEqual(NORMAL_TOLERANCE);
  });

  it('randn.f16: a half draw is the float32 draw rounded', () => {
    const { data } = expected('randn.f16.seed23');
    expect(maxDifference(toFloat16(torchGenerator(23).normal(data.length)), data)).toBeLessThanOrEqual(1);
  });

  it('randn.bf16: likewise', () => {
    const wanted = toFloat32(expected('randn.bf16.seed23'));
    const drawn = torchGenerator(23).normal(wanted.length);
    // Rounding to 8 significant bits moves a value by at most 2^-9 of the power of two above it.
    for (const [i, value] of drawn.entries()) {
      expect(Math.abs(value - wanted[i]!)).toBeLessThanOrEqual(Math.abs(value) * 2 ** -8 + NORMAL_TOLERANCE);
    }
  });

  it('rand, randint and randperm exactly', () => {
    expect([...torchGenerator(23).uniform(64)]).toEqual([...expected('rand.f32.seed23').data]);
    expect(torchGenerator(23).integers(0, 1000, 16)).toEqual([...expected('randint.seed23').data]);
    expect([...torchGenerator(23).permutation(20)]).toEqual([...expected('randperm.seed23').data]);
  });

  it('every golden tensor is one of the above', () => {
    expect(tensors.size).toBe(11);
  });
});

describe('seeds', () => {
  it('count modulo 2^32, up to 2^64 - 1', () => {
    const draw = (seed: number | bigint) => [...torchGenerator(seed).uniform(4)];
    expect(draw(2n ** 64n - 1n)).toEqual(draw(2 ** 32 - 1));
    expect(draw(2n ** 40n + 5n)).toEqual(draw(5));
    expect(draw(2 ** 40 + 5)).toEqual(draw(5));
    expect(draw(5)).not.toEqual(draw(6));
  });

  it.each([-1, 1.5, Number.NaN, 2 ** 64, -1n, 2n ** 64n])('%s is refused', (seed) => {
    expect(() => torchGenerator(seed)).toThrow(/seed/);
    expect(() => samplerNoise(seed, 4)).toThrow(/seed/);
  });
});

describe('the state of a generator', () => {
  it('continues the stream exactly, through JSON, in the middle of a pair and of a block of words', () => {
    const generator = torchGenerator(11);
    generator.normal(1000);
    generator.normal(3);
    const saved: TorchGeneratorState = JSON.parse(JSON.stringify(generator.state()));
    const rest = (from: typeof generator) => [
      ...from.normal(5),
      ...from.uniform(1000),
      ...from.normal(37),
      ...from.integers(-5, 5, 10),
      ...from.permutation(9),
    ];
    const expectedRest = rest(generator);
    expect(rest(torchGenerator(saved))).toEqual(expectedRest);
    // The saved state is a copy, which the first continuation has not used up.
    expect(rest(torchGenerator(saved))).toEqual(expectedRest);
  });

  it('is refused when damaged', () => {
    const state = torchGenerator(0).state();
    for (const damage of [
      { words: state.words.slice(1) },
      { words: state.words.map(() => -1) },
      { position: 625 },
      { waitingNormal: Number.NaN },
    ]) {
      expect(() => torchGenerator({ ...state, ...damage })).toThrow(/damaged/);
    }
  });
});

it('integers stay in range and refuse one they cannot draw from', () => {
  const drawn = torchGenerator(3).integers(-2, 3, 500);
  expect(new Set(drawn)).toEqual(new Set([-2, -1, 0, 1, 2]));
  for (const [low, high] of [
    [0, 0],
    [5, 4],
    [0, 2 ** 28],
    [0, 1.5],
  ] as const) {
    expect(() => torchGenerator(3).integers(low, high, 1)).toThrow(RangeError);
  }
});

it('sampler noise is one stream, seeded one above the latent', () => {
  const noise = samplerNoise(41, 20);
  const stream = torchGenerator(42);
  expect(noise()).toEqual(stream.normal(20));
  expect(noise()).toEqual(stream.normal(20));
  expect(samplerNoise(2 ** 32 - 1, 20)()).toEqual(torchGenerator(0).normal(20));
});
