import { describe, expect, it } from 'vitest';
import { torchGenerator } from '../../src/sampling/noise.ts';
import {
  DEFAULT_DENSITY,
  densityLevel,
  drawSigmas,
  type LossWeighting,
  lossWeights,
  type SigmaDensity,
  trainingShift,
  validationMean,
  validationSigmas,
} from '../../src/training/timesteps.ts';
import { golden, maxDifference, readGolden } from '../support/golden.ts';

const tensors = readGolden('train');
const get = (name: string) => golden(tensors, name).data as Float32Array;

/** Share of drawn levels up to each of 19 levels, 0.05 to 0.95. */
const LEVELS = Array.from({ length: 19 }, (_, i) => (i + 1) / 20);
const DRAWS = 40_000;
/** Five standard deviations of a share of that many draws. */
const SPREAD = (5 * 0.5) / Math.sqrt(DRAWS);

function shares(density: SigmaDensity, options = {}): number[] {
  const drawn = drawSigmas(density, DRAWS, torchGenerator(5), options).sort();
  return LEVELS.map((level) => drawn.filter((sigma) => sigma <= level).length / DRAWS);
}

/** Integrals of a density from 0 to each level, by the midpoint rule. */
function integrals(density: (t: number) => number): number[] {
  const cells = 20_000;
  return LEVELS.map((level) => {
    let sum = 0;
    for (let i = 0; i < cells; i++) sum += density(((i + 0.5) / cells) * level);
    return (sum * level) / cells;
  });
}

describe('densities of noise levels', () => {
  it.each([
    ['density.z', 'density.logit_normal_m0_s1', { kind: 'logit-normal', mean: 0, std: 1 }],
    ['density.z', 'density.logit_normal_m0.5_s0.6', { kind: 'logit-normal', mean: 0.5, std: 0.6 }],
    ['density.u', 'density.mode_1.29', { kind: 'mode', scale: 1.29 }],
    ['density.u', 'density.mode_1.29', { kind: 'mode' }],
  ] satisfies [string, string, SigmaDensity][])('turn %s into %s of the reference', (draws, name, density) => {
    const levels = get(draws).map((draw) => densityLevel(density, draw));
    expect(maxDifference(levels, get(name))).toBeLessThan(1e-6);
  });

  it('are drawn as torch.randn and torch.rand draw them', () => {
    const normal = torchGenerator(3).normal(20);
    const uniform = torchGenerator(3).uniform(20);
    const sigmoid = normal.map((z) => 1 / (1 + Math.exp(-z)));
    expect(maxDifference(drawSigmas(DEFAULT_DENSITY, 20, torchGenerator(3)), sigmoid)).toBeLessThan(1e-6);
    expect(drawSigmas({ kind: 'uniform' }, 20, torchGenerator(3))).toEqual(uniform);
  });

  it('follow the formulas of the paper', () => {
    const logitNormal = (t: number) =>
      Math.exp(-((Math.log(t / (1 - t)) - 0.5) ** 2) / (2 * 0.6 ** 2)) / (0.6 * Math.sqrt(2 * Math.PI) * t * (1 - t));
    const expected: [SigmaDensity, number[]][] = [
      [{ kind: 'logit-normal', mean: 0.5, std: 0.6 }, integrals(logitNormal)],
      [{ kind: 'cosmap' }, integrals((t) => 2 / (Math.PI - 2 * Math.PI * t + 2 * Math.PI * t * t))],
      [{ kind: 'uniform' }, LEVELS],
    ];
    for (const [density, integral] of expected) {
      expect(maxDifference(shares(density), integral), density.kind).toBeLessThan(SPREAD);
    }
  });

  it('counted from the noisy end are mirrored', () => {
    const mirrored = shares({ kind: 'logit-normal', mean: 0.5 }, { countedFrom: 'noisy' });
    expect(maxDifference(mirrored, shares({ kind: 'logit-normal', mean: -0.5 }))).toBeLessThan(2 * SPREAD);
    expect(mirrored[9]!).toBeGreaterThan(0.6);
    const mode = shares({ kind: 'mode' }, { countedFrom: 'noisy' });
    expect(maxDifference(mode, shares({ kind: 'mode' }))).toBeLessThan(2 * SPREAD);
  });

  it('are shifted as by the reference, and only then bounded as by kohya', () => {
    const u = get('density.u');
    const random = { ...torchGenerator(0), uniform: () => u };
    expect(
      maxDifference(drawSigmas({ kind: 'uniform' }, 15, random, { shift: 3 }), get('density.shift3')),
    ).toBeLessThan(1e-6);
    const bounded = drawSigmas({ kind: 'uniform' }, 15, random, { shift: 3, min: 0.2, max: 0.7 });
    const expected = get('density.shift3').map((sigma) => (sigma * 500 + 200) / 1000);
    expect(maxDifference(bounded, expected)).toBeLessThan(1e-6);
  });

  it.each([
    [{ kind: 'logit-normal', std: 0 }, {}, 'The standard deviation of the logit-normal noise levels is 0;'],
    [{ kind: 'logit-normal', mean: Number.NaN }, {}, 'The mean of the logit-normal noise levels is NaN;'],
    [{ kind: 'mode', scale: 1.8 }, {}, 'The scale of the mode noise levels is 1.8; give a number from -1 to 1.752.'],
    [{ kind: 'uniform' }, { shift: 0 }, 'The training shift is 0; give a number above 0.'],
    [{ kind: 'uniform' }, { min: 0.5, max: 0.4 }, 'The noise levels 0.5 to 0.4 are no range;'],
    [{ kind: 'uniform' }, { max: 1000 }, 'The noise levels 0 to 1000 are no range;'],
  ] satisfies [SigmaDensity, object, string][])('refuse %o with %o', (density, options, message) => {
    expect(() => drawSigmas(density, 1, torchGenerator(0), options)).toThrow(message);
  });
});

describe('the training shift', () => {
  it('is fixed, or grows with the root of the number of tokens', () => {
    expect(trainingShift({ kind: 'fixed', shift: 3 }, 1)).toBe(3);
    // 256x256 pixels are 256 tokens, 1024x1024 are 4096.
    expect(trainingShift({ kind: 'resolution', baseTokens: 256 }, 4096)).toBe(4);
    expect(trainingShift({ kind: 'resolution', baseTokens: 4096, baseShift: 3 }, 1024)).toBe(1.5);
  });

  it('refuses a shift or base of nothing', () => {
    expect(() => trainingShift({ kind: 'fixed', shift: 0 }, 256)).toThrow('The training shift is 0; give a number');
    expect(() => trainingShift({ kind: 'resolution', baseTokens: 0 }, 256)).toThrow(
      'The base of the training shift in tokens is 0; give a number above 0.',
    );
  });
});

describe('loss weights', () => {
  /** The mean square error of each item of the golden step, from the reference's velocities. */
  function itemLosses(): number[] {
    const [v, x0, noise] = [get('step0.v'), get('in.x0'), get('in.noise')];
    const size = x0.length / 2;
    return [0, 1].map((item) => {
      let sum = 0;
      for (let i = item * size; i < (item + 1) * size; i++) sum += (v[i]! - (noise[i]! - x0[i]!)) ** 2;
      return sum / size;
    });
  }

  it.each([
    ['step0.loss', { kind: 'none' }],
    ['step0.loss_precond', { kind: 'none', preconditioned: true }],
    ['step0.loss_sigma_sqrt', { kind: 'sigma_sqrt', preconditioned: true }],
    ['step0.loss_cosmap', { kind: 'cosmap', preconditioned: true }],
    ['step0.loss_cosmap_v', { kind: 'cosmap' }],
  ] satisfies [string, LossWeighting][])('give %s of the reference from the loss on velocities', (name, weighting) => {
    const weights = lossWeights(weighting, get('in.sigma').slice(0, 2));
    const loss = itemLosses().reduce((sum, item, i) => sum + (item * weights[i]!) / 2, 0);
    expect(Math.abs(loss / get(name)[0]! - 1)).toBeLessThan(1e-5);
  });

  it('of sigma_sqrt alone is sigma^-2, and refused without noise', () => {
    expect(lossWeights({ kind: 'sigma_sqrt' }, Float32Array.of(0.5, 0.25))).toEqual(Float32Array.of(4, 16));
    expect(() => lossWeights({ kind: 'sigma_sqrt' }, Float32Array.of(0))).toThrow(/is infinite without noise; set/);
    expect(lossWeights({ kind: 'sigma_sqrt', preconditioned: true }, Float32Array.of(0))).toEqual(Float32Array.of(1));
  });
});

describe('validation', () => {
  it('averages eight equidistant levels without the last', () => {
    const levels = validationSigmas();
    expect([...levels]).toEqual([0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1]);
    const losses = [...levels].map((sigma, i) => ({ sigma, loss: i === 7 ? 1e9 : i }));
    expect(validationMean(losses)).toBe(3);
  });
});
