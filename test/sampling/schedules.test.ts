import { describe, expect, it } from 'vitest';
import {
  diffusersSigmas,
  dynamicShift,
  MAX_STEPS,
  partialSigmas,
  percentToSigma,
  resolutionShift,
  type ScheduleName,
  scheduleNames,
  scheduleSigmas,
  sigmaTable,
  timestep,
} from '../../src/sampling/schedules.ts';
import { golden, maxDifference, readGolden } from '../support/golden.ts';

const TOLERANCE = 1e-6;
const goldens = readGolden('schedules');

/** The slg.* tensors are window flags, tested with the guidance. */
const names = [...goldens.keys()].filter((name) => !name.startsWith('slg.'));
const tested = new Set<string>();

/** Compares one golden tensor and remembers that it was. */
function expectGolden(name: string, actual: ArrayLike<number>, tolerance = TOLERANCE) {
  tested.add(name);
  expect(maxDifference(actual, golden(goldens, name).data), name).toBeLessThanOrEqual(tolerance);
}

describe('named schedules agree with the reference implementations', () => {
  it.each(names.filter((name) => /^comfy\./.test(name)))('%s', (name) => {
    const [, schedule, steps] = /^comfy\.(\w+)\.n(\d+)$/.exec(name)!;
    expectGolden(name, scheduleSigmas(schedule as ScheduleName, Number(steps)));
  });

  it.each(names.filter((name) => /^stability\./.test(name)))('%s', (name) => {
    const [, shift, steps] = /^stability\.shift(\d+)\.n(\d+)$/.exec(name)!;
    expectGolden(name, scheduleSigmas('normal', Number(steps), { shift: Number(shift) }));
    expect(
      maxDifference(diffusersSigmas(Number(steps), { shift: Number(shift) }), golden(goldens, name).data),
    ).toBeLessThan(TOLERANCE);
  });

  it.each(names.filter((name) => /^table\./.test(name)))('%s', (name) => {
    expectGolden(name, sigmaTable(Number(/^table\.shift(\d+)$/.exec(name)![1])));
  });

  it.each(names.filter((name) => /^diffusers\.timesteps\./.test(name)))('%s', (name) => {
    const steps = Number(/n(\d+)$/.exec(name)![1]);
    expectGolden(name, [...scheduleSigmas('normal', steps)].slice(0, steps).map(timestep), 1e-3);
  });
});

describe('diffusers options', () => {
  it.each(names.filter((name) => /^diffusers\.use_/.test(name)))('%s', (name) => {
    const curve = /use_(karras|exponential|beta)_sigmas/.exec(name)![1] as 'karras' | 'exponential' | 'beta';
    expectGolden(name, diffusersSigmas(28, { curve }));
  });

  it.each(names.filter((name) => /^diffusers\.dynamic\./.test(name)))('%s', (name) => {
    const imageTokens = Number(/L(\d+)/.exec(name)![1]);
    expectGolden(name, diffusersSigmas(28, { imageTokens }));
  });

  it('puts mu on the line through (256, 0.5) and (4096, 1.15)', () => {
    expect(Math.log(dynamicShift(256))).toBeCloseTo(0.5, 12);
    expect(Math.log(dynamicShift(4096))).toBeCloseTo(1.15, 12);
    expect(Math.log(dynamicShift(4096, { maxMu: 1.16 }))).toBeCloseTo(1.16, 12);
  });

  it('refuses a fixed shift together with one that depends on the image', () => {
    expect(() => diffusersSigmas(10, { shift: 3, imageTokens: 1024 })).toThrow(/either a fixed shift/);
  });
});

describe('conversions', () => {
  it('percentToSigma', () => {
    const percents = Array.from(golden(goldens, 'percent_to_sigma.p').data as Float32Array);
    tested.add('percent_to_sigma.p');
    expectGolden(
      'percent_to_sigma.sigma',
      percents.map((percent) => percentToSigma(percent)),
    );
  });

  it("the paper's shift for a change of resolution", () => {
    const sides = [
      [512, 256],
      [1024, 256],
      [1440, 1024],
    ] as const;
    expectGolden(
      'paper.alpha',
      sides.map(([side, base]) => resolutionShift(side ** 2, base ** 2)),
      0,
    );
  });
});

it('every golden schedule was compared', () => {
  expect(names.filter((name) => !tested.has(name))).toEqual([]);
});

describe('every schedule', () => {
  it.each(scheduleNames)('%s falls strictly to 0 at any number of steps', (schedule) => {
    for (const steps of [1, 2, 3, 7, 20, 28, 150, 999]) {
      const values = scheduleSigmas(schedule, steps);
      expect(values.at(-1)).toBe(0);
      expect(values[0]).toBeLessThanOrEqual(1);
      for (let i = 1; i < values.length; i++) expect(values[i]).toBeLessThan(values[i - 1]!);
    }
  });

  it.each([0, -1, 2.5, Number.NaN, MAX_STEPS + 1])('refuses %s steps', (steps) => {
    expect(() => scheduleSigmas('normal', steps)).toThrow(/number of steps/);
    expect(() => diffusersSigmas(steps)).toThrow(/number of steps/);
  });

  it.each([0, -3, Number.NaN, Number.POSITIVE_INFINITY])('refuses a shift of %s', (shift) => {
    expect(() => scheduleSigmas('normal', 10, { shift })).toThrow(/shift/);
  });

  it('names the schedules it knows when asked for another', () => {
    expect(() => scheduleSigmas('cosine' as ScheduleName, 10)).toThrow(/"cosine".*sgm_uniform/);
  });
});

describe('partial schedules', () => {
  const normal = (steps: number) => scheduleSigmas('normal', steps);

  it('stability leaves out the first trunc(steps * (1 - denoise))', () => {
    const tensors = readGolden('sampling');
    const expected = golden(tensors, 'img2img.sigmas').data;
    expect(maxDifference(partialSigmas(normal, 8, 0.6, 'stability'), expected)).toBeLessThanOrEqual(TOLERANCE);
    // 10 * (1 - 0.8) is 1.9999999999999996 in floating point, in Python as here: one step more than one would think.
    expect(partialSigmas(normal, 10, 0.8, 'stability')).toHaveLength(10);
  });

  it('diffusers counts the same steps from the other end', () => {
    expect(partialSigmas(normal, 10, 0.8, 'diffusers')).toEqual(normal(10).slice(2));
    expect(partialSigmas(normal, 50, 0.6, 'diffusers')).toEqual(normal(50).slice(20));
    expect(partialSigmas(normal, 10, 0.05, 'diffusers')).toEqual(normal(10).slice(9));
  });

  it('comfyui runs all the steps at the end of a longer schedule', () => {
    expect(partialSigmas(normal, 20, 0.75, 'comfyui')).toEqual(normal(26).slice(6));
  });

  it.each(['stability', 'comfyui', 'diffusers'] as const)('%s: a denoise of 1 is the whole schedule', (rule) => {
    expect(partialSigmas(normal, 12, 1, rule)).toEqual(normal(12));
  });

  it('refuses a denoise outside (0, 1] and one too small to plan for', () => {
    for (const denoise of [0, -0.1, 1.1, Number.NaN]) {
      expect(() => partialSigmas(normal, 10, denoise, 'stability')).toThrow(/Denoise/);
    }
    expect(() => partialSigmas(normal, 20, 1e-9, 'comfyui')).toThrow(/raise denoise/);
  });
});
