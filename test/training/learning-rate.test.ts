import { describe, expect, it } from 'vitest';
import { type LearningRateOptions, learningRate } from '../../src/training/learning-rate.ts';

/**
 * Rates of PyTorch 2.13 over 40 steps from a peak of 2e-4 after a warm-up of 8: LinearLR, then the scheduler named,
 * joined by SequentialLR. diffusers' formulas (get_scheduler) give the same numbers.
 */
const STEPS = [0, 1, 4, 8, 9, 15, 16, 20, 24, 31, 39, 40];
const references: [string, LearningRateOptions, number[]][] = [
  ['ConstantLR', { peak: 2e-4, warmup: 8 }, [0, 2.5e-5, 1e-4, 2e-4, 2e-4, 2e-4, 2e-4, 2e-4, 2e-4, 2e-4, 2e-4, 2e-4]],
  [
    'LinearLR to a tenth',
    { peak: 2e-4, warmup: 8, schedule: 'linear', end: 0.1 },
    [0, 2.5e-5, 1e-4, 2e-4, 1.94375e-4, 1.60625e-4, 1.55e-4, 1.325e-4, 1.1e-4, 7.0625e-5, 2.5625e-5, 2e-5],
  ],
  [
    'CosineAnnealingLR to a tenth',
    { peak: 2e-4, warmup: 8, schedule: 'cosine', end: 0.1 },
    [
      ...[0, 2.5e-5, 1e-4, 2e-4, 1.99566625e-4, 1.79570941e-4, 1.7363961e-4, 1.44441509e-4],
      ...[1.1e-4, 5.29046044e-5, 2.04333746e-5, 2e-5],
    ],
  ],
  [
    'PolynomialLR of power 2',
    { peak: 2e-4, warmup: 8, schedule: 'polynomial', power: 2 },
    [0, 2.5e-5, 1e-4, 2e-4, 1.87695313e-4, 1.22070313e-4, 1.125e-4, 7.8125e-5, 5e-5, 1.58203125e-5, 1.953125e-7, 0],
  ],
  [
    // PyTorch's would start once more at step 40, diffusers' ends there.
    'CosineAnnealingWarmRestarts of 4 cycles',
    { peak: 2e-4, warmup: 8, schedule: 'cosine', cycles: 4 },
    [0, 2.5e-5, 1e-4, 2e-4, 1.92387953e-4, 7.61204675e-6, 2e-4, 1e-4, 2e-4, 7.61204675e-6, 7.61204675e-6, 0],
  ],
];

describe('the learning rate', () => {
  it.each(references)('equals %s', (_, options, expected) => {
    const rate = learningRate(options, 40);
    for (const [i, step] of STEPS.entries()) expect(Math.abs(rate(step) - expected[i]!)).toBeLessThan(1e-12);
  });

  it('stays at its end after the last step', () => {
    expect(learningRate({ peak: 1, schedule: 'cosine', end: 0.1 }, 10)(1000)).toBe(0.1);
    expect(learningRate({ peak: 1, schedule: 'polynomial', power: 0.5 }, 10)(11)).toBe(0);
    expect(learningRate({ peak: 1 }, 10)(1000)).toBe(1);
  });

  it('starts at its peak without a warm-up, and only rises in one that is longer than the stage', () => {
    for (const schedule of ['constant', 'linear', 'cosine', 'polynomial'] as const) {
      expect(learningRate({ peak: 3e-4, schedule }, 10)(0)).toBe(3e-4);
      expect(learningRate({ peak: 1, schedule, warmup: 20 }, 10)(10)).toBe(0.5);
    }
  });

  it.each([
    [{ peak: 0 }, 'The learning rate is 0; give a number above 0.'],
    [{ peak: 1, warmup: 0.5 }, 'The warm-up of the learning rate is 0.5; give a whole number of steps.'],
    [{ peak: 1, end: 2 }, 'The end of the learning rate is 2; give a share of its peak, 0 to 1.'],
    [{ peak: 1, cycles: 0 }, 'The number of cycles is 0; give a whole number above 0.'],
    [{ peak: 1, power: Number.NaN }, 'The power of the learning rate is NaN; give a number above 0.'],
  ] satisfies [LearningRateOptions, string][])('refuses %o', (options, message) => {
    expect(() => learningRate(options, 10)).toThrow(message);
  });
});
