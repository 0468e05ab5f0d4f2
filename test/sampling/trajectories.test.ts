import { beforeAll, describe, expect, it } from 'vitest';
import { loadTransformer } from '../../src/models/transformer.ts';
import { velocityModel } from '../../src/pipeline/pipeline.ts';
import { guidedDenoiser, type SkipLayerGuidance, type VelocityModel } from '../../src/sampling/guidance.ts';
import { type SamplerName, samplers } from '../../src/sampling/samplers.ts';
import type { Denoiser, SamplerStep } from '../../src/sampling/steps.ts';
import type { FloatTensor } from '../../src/tensor/data.ts';
import { golden, maxDifference, readGolden } from '../support/golden.ts';
import { goldenCheckpoint } from '../support/models.ts';
import { cpu } from '../support/run.ts';

/**
 * The transformer of `tiny_sd35.safetensors`, conditioned on the golden `cond.*` (positive) and `uncond.*` (negative)
 * embeddings of `text.safetensors`.
 */
async function loadTinyTransformer(): Promise<VelocityModel> {
  const { parts } = await goldenCheckpoint();
  const text = readGolden('text');
  const conditioning = (name: string) => ({
    context: golden(text, `${name}.context`) as FloatTensor,
    pooled: golden(text, `${name}.pooled`) as FloatTensor,
  });
  return velocityModel(loadTransformer(cpu, parts.transformer!), conditioning('cond'), conditioning('uncond'));
}

const TOLERANCE = 1e-4;
const CFG = 5;
const STEPS = 8;
const SHAPE = [1, 16, 10, 14];
const SIZE = 16 * 10 * 14;

const tensors = readGolden('sampling');
const values = (name: string) => golden(tensors, name).data as Float32Array;
const row = (name: string, i: number) => values(name).subarray(i * SIZE, (i + 1) * SIZE);

describe('whole sampling runs on the tiny transformer', { timeout: 60_000 }, () => {
  let velocity: VelocityModel;
  let active: boolean[];

  beforeAll(async () => {
    const model = await loadTinyTransformer();
    velocity = (request) => {
      active.push(request.passes.includes('positive-skipping-layers'));
      return model(request);
    };
  });

  function denoiser(skipLayer?: SkipLayerGuidance): Denoiser {
    active = [];
    return guidedDenoiser({ velocity, shape: SHAPE, cfg: CFG, steps: STEPS, ...(skipLayer && { skipLayer }) });
  }

  async function run(sampler: SamplerName, denoise: Denoiser, latent: Float32Array, sigmas: Float32Array) {
    let draws = 0;
    const steps: SamplerStep[] = [];
    const noise = () => row('sampler_noise', draws++);
    for await (const step of samplers[sampler](denoise, latent, sigmas, { noise })) steps.push(step);
    return steps;
  }

  const skipLayer: SkipLayerGuidance = { layers: [1, 2], scale: 2.5, start: 0.01, end: 0.5, rule: 'steps' };

  it.each([
    ['euler', 'euler', undefined],
    ['euler_slg', 'euler', skipLayer],
    ['dpmpp_2m', 'dpmpp_2m', undefined],
    ['dpmpp_2m_slg', 'dpmpp_2m', skipLayer],
  ] as const)('Stability %s: every latent and every prediction', async (name, sampler, guidance) => {
    const steps = await run(sampler, denoiser(guidance), row(`${name}.x`, 0), values('sigmas'));
    expect(steps).toHaveLength(STEPS);
    for (const [i, { latent, denoised }] of steps.entries()) {
      expect(maxDifference(denoised, row(`${name}.denoised`, i)), `prediction ${i}`).toBeLessThan(TOLERANCE);
      expect(maxDifference(latent, row(`${name}.x`, i + 1)), `latent ${i + 1}`).toBeLessThan(TOLERANCE);
    }
    expect(active).toEqual(steps.map((_, i) => guidance !== undefined && i >= 1 && i <= 3));
  });

  it('Stability image to image', async () => {
    const steps = await run('euler', denoiser(), row('img2img.x', 0), values('img2img.sigmas'));
    expect(steps).toHaveLength(5);
    for (const [i, { latent, denoised }] of steps.entries()) {
      expect(maxDifference(denoised, row('img2img.denoised', i)), `prediction ${i}`).toBeLessThan(TOLERANCE);
      expect(maxDifference(latent, row('img2img.x', i + 1)), `latent ${i + 1}`).toBeLessThan(TOLERANCE);
    }
  });

  it('ComfyUI euler with its skip-layer window', async () => {
    const steps = await run('euler', denoiser({ ...skipLayer, rule: 'sigma' }), values('noise'), values('sigmas'));
    expect(maxDifference(steps.at(-1)!.latent, values('comfy.euler_slg.out'))).toBeLessThan(TOLERANCE);
    expect(active.map(Number)).toEqual([...(golden(tensors, 'comfy.euler_slg.active').data as Uint8Array)]);
  });

  it.each([
    ['euler_sgm', 'euler', 8],
    ['heun', 'heun', 15],
    ['dpm_2', 'dpm_2', 15],
    ['euler_ancestral', 'euler_ancestral', 8],
    ['dpmpp_2m_sde', 'dpmpp_2m_sde', 8],
    ['dpmpp_2m_sde_heun', 'dpmpp_2m_sde_heun', 8],
    ['dpmpp_2m_sgm', 'dpmpp_2m', 8],
    ['dpmpp_sde', 'dpmpp_sde', 15],
    ['res_multistep', 'res_multistep', 8],
    ['lcm', 'lcm', 8],
    ['ipndm', 'ipndm', 8],
    ['deis', 'deis', 8],
    ['gradient_estimation', 'gradient_estimation', 8],
  ] as const)('ComfyUI %s: the final latent and the number of model calls', async (name, sampler, calls) => {
    const steps = await run(sampler, denoiser(), values('noise'), values('comfy.sigmas_sgm_uniform'));
    expect(maxDifference(steps.at(-1)!.latent, values(`comfy.${name}.out`))).toBeLessThan(TOLERANCE);
    expect(active).toHaveLength(calls);
  });
});
