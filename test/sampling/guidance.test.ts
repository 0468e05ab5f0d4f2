import { describe, expect, it } from 'vitest';
import { comfyuiSkipLayer, stabilityDefaults } from '../../src/sampling/defaults.ts';
import {
  guidedDenoiser,
  type Pass,
  type SkipLayerGuidance,
  type VelocityModel,
  type VelocityRequest,
} from '../../src/sampling/guidance.ts';
import { type ScheduleName, scheduleSigmas } from '../../src/sampling/schedules.ts';
import { floats } from '../../src/tensor/data.ts';
import { golden, readGolden } from '../support/golden.ts';

const SHAPE = [1, 1, 1, 2];

/** A model whose velocity is one known pair of values for each pass, and which remembers what it was asked. */
const velocities: Record<Pass, [number, number]> = {
  positive: [1, -2],
  negative: [0.5, 1],
  'positive-skipping-layers': [0.25, -1],
};

function recordingModel() {
  const requests: VelocityRequest[] = [];
  const velocity: VelocityModel = async (request) => {
    requests.push(request);
    return request.passes.map((pass) => floats(SHAPE, velocities[pass]));
  };
  return { velocity, requests };
}

const latent = Float32Array.of(3, 4);
const always: SkipLayerGuidance = { layers: [7, 8], scale: 2, start: 0, end: 1, rule: 'sigma' };

describe('the guided prediction', () => {
  it('moves from the negative to the positive velocity and beyond, and steps back to x0', async () => {
    const { velocity, requests } = recordingModel();
    const denoise = guidedDenoiser({ velocity, shape: SHAPE, cfg: 5, steps: 10 });
    // 0.5 + 5 (1 - 0.5) = 3 and 1 + 5 (-2 - 1) = -14
    expect([...(await denoise(latent, 0.5))]).toEqual([3 - 0.5 * 3, 4 + 0.5 * 14]);
    expect(requests[0]).toMatchObject({ sigma: 0.5, passes: ['positive', 'negative'], skipLayers: [] });
    expect(requests[0]!.latent.shape).toEqual(SHAPE);
  });

  it('does not compute the negative pass at a scale of 1', async () => {
    const { velocity, requests } = recordingModel();
    const denoise = guidedDenoiser({ velocity, shape: SHAPE, cfg: 1, steps: 10 });
    expect([...(await denoise(latent, 0.5))]).toEqual([2.5, 5]);
    expect(requests[0]!.passes).toEqual(['positive']);
  });

  it('adds the difference that the skipped layers make', async () => {
    const { velocity, requests } = recordingModel();
    const denoise = guidedDenoiser({ velocity, shape: SHAPE, cfg: 5, steps: 10, skipLayer: always });
    // 3 + 2 (1 - 0.25) = 4.5 and -14 + 2 (-2 + 1) = -16
    expect([...(await denoise(latent, 0.5))]).toEqual([3 - 0.5 * 4.5, 4 + 0.5 * 16]);
    expect(requests[0]!.skipLayers).toEqual([7, 8]);
    expect(requests[0]!.passes).toEqual(['positive', 'negative', 'positive-skipping-layers']);
  });

  it('skips layers without a negative pass too', async () => {
    const { velocity, requests } = recordingModel();
    const denoise = guidedDenoiser({ velocity, shape: SHAPE, cfg: 1, steps: 10, skipLayer: always });
    // 1 + 2 (1 - 0.25) = 2.5 and -2 + 2 (-2 + 1) = -4
    expect([...(await denoise(latent, 0.5))]).toEqual([3 - 0.5 * 2.5, 4 + 0.5 * 4]);
    expect(requests[0]!.passes).toEqual(['positive', 'positive-skipping-layers']);
  });

  it.each([
    ['a scale of 0', { ...always, scale: 0 }],
    ['no layers', { ...always, layers: [] }],
  ])('does not compute the skipping pass with %s', async (_, skipLayer) => {
    const { velocity, requests } = recordingModel();
    await guidedDenoiser({ velocity, shape: SHAPE, cfg: 5, steps: 10, skipLayer })(latent, 0.5);
    expect(requests[0]!.passes).toEqual(['positive', 'negative']);
  });

  it('hands the signal on', async () => {
    const { velocity, requests } = recordingModel();
    const { signal } = new AbortController();
    await guidedDenoiser({ velocity, shape: SHAPE, cfg: 1, steps: 10, signal })(latent, 0.5);
    expect(requests[0]!.signal).toBe(signal);
  });

  it.each([Number.NaN, Number.POSITIVE_INFINITY])('reports a model that yields %s', async (bad) => {
    const velocity: VelocityModel = async () => [floats(SHAPE, [0, bad])];
    const denoise = guidedDenoiser({ velocity, shape: SHAPE, cfg: 1, steps: 10 });
    await expect(denoise(latent, 0.5)).rejects.toMatchObject({ code: 'not-finite' });
  });
});

describe('the window of skip-layer guidance agrees with the reference implementations', () => {
  const tensors = readGolden('schedules');

  async function activeSteps(sigmas: Float32Array, steps: number, skipLayer: SkipLayerGuidance) {
    const { velocity, requests } = recordingModel();
    const denoise = guidedDenoiser({ velocity, shape: SHAPE, cfg: 5, steps, skipLayer });
    for (const sigma of sigmas.subarray(0, steps)) await denoise(latent, sigma);
    return requests.map(({ passes }) => Number(passes.includes('positive-skipping-layers')));
  }

  const names = [...tensors.keys()].filter((name) => name.startsWith('slg.'));

  it('there are goldens for both rules', () => expect(names).toHaveLength(16));

  it.each(names)('%s', async (name) => {
    const steps = Number(/n(\d+)$/.exec(name)![1]);
    const schedule = (/comfy\.(\w+)\./.exec(name)?.[1] ?? 'normal') as ScheduleName;
    const skipLayer = name.includes('comfy') ? comfyuiSkipLayer : stabilityDefaults.skipLayer;
    const active = await activeSteps(scheduleSigmas(schedule, steps), steps, skipLayer);
    expect(active).toEqual([...golden(tensors, name).data]);
  });

  it('by sigma includes both ends and moves with the shift', async () => {
    const { velocity, requests } = recordingModel();
    const skipLayer = { ...always, start: 0.25, end: 0.5 };
    const denoise = guidedDenoiser({ velocity, shape: SHAPE, cfg: 5, steps: 10, skipLayer, shift: 1 });
    for (const sigma of [0.76, 0.75, 0.5, 0.49]) await denoise(latent, sigma);
    expect(requests.map(({ skipLayers }) => skipLayers.length > 0)).toEqual([false, true, true, false]);
  });
});

describe('guidance that makes no sense is refused', () => {
  const { velocity } = recordingModel();
  const create = (options: { cfg?: number; skipLayer?: SkipLayerGuidance }) =>
    guidedDenoiser({ velocity, shape: SHAPE, cfg: 5, steps: 10, ...options });

  it.each([
    ['a scale that is no number', { cfg: Number.NaN }, /guidance scale/],
    ['a layer below 0', { skipLayer: { ...always, layers: [-1] } }, /block indices/],
    ['half a layer', { skipLayer: { ...always, layers: [7.5] } }, /block indices/],
    ['a negative skip-layer scale', { skipLayer: { ...always, scale: -1 } }, /skip-layer scale/],
    ['a window that ends before it starts', { skipLayer: { ...always, start: 0.5, end: 0.2 } }, /window/],
    ['a window beyond the end', { skipLayer: { ...always, end: 1.5 } }, /window/],
  ])('%s', (_, options, message) => {
    expect(() => create(options)).toThrow(message);
  });
});
