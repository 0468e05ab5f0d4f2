/** The samplers by the names users know, which are ComfyUI's; each agrees with ComfyUI on rectified flow models. */
import { deis, dpmpp2m, gradientEstimation, ipndm, resMultistep } from './multistep.ts';
import { dpm2, euler, heun } from './single-step.ts';
import type { Sampler } from './steps.ts';
import { dpmpp2mSde, dpmpp2mSdeHeun, dpmppSde, eulerAncestral, lcm } from './stochastic.ts';

export const samplerNames = [
  'euler',
  'heun',
  'dpm_2',
  'euler_ancestral',
  'dpmpp_2m',
  'dpmpp_2m_sde',
  'dpmpp_2m_sde_heun',
  'dpmpp_sde',
  'res_multistep',
  'lcm',
  'ipndm',
  'deis',
  'gradient_estimation',
] as const;

export type SamplerName = (typeof samplerNames)[number];

export const samplers: Record<SamplerName, Sampler> = {
  euler,
  heun,
  dpm_2: dpm2,
  euler_ancestral: eulerAncestral,
  dpmpp_2m: dpmpp2m,
  dpmpp_2m_sde: dpmpp2mSde,
  dpmpp_2m_sde_heun: dpmpp2mSdeHeun,
  dpmpp_sde: dpmppSde,
  res_multistep: resMultistep,
  lcm,
  ipndm,
  deis,
  gradient_estimation: gradientEstimation,
};
