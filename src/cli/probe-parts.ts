/** The parts that `mmditx probe` runs: which tensors each takes and gives. */
import { MmditxError } from '../errors.ts';
import { loadAutoencoder } from '../models/autoencoder.ts';
import { type TransformerConfig, vaeDownscale } from '../models/config.ts';
import { centreCorner } from '../models/mmditx.ts';
import { loadClip, loadT5 } from '../models/text-encoders.ts';
import { loadTransformer } from '../models/transformer.ts';
import { modelDefaults } from '../pipeline/defaults.ts';
import { velocityModel } from '../pipeline/pipeline.ts';
import type { Runtime } from '../runtime/runtime.ts';
import { guidedDenoiser } from '../sampling/guidance.ts';
import { samplerNoise, torchGenerator } from '../sampling/noise.ts';
import { samplers } from '../sampling/samplers.ts';
import { scheduleSigmas } from '../sampling/schedules.ts';
import { elementCount, type FloatTensor, floats } from '../tensor/index.ts';
import { gradientSource } from '../training/gradients.ts';
import { flowBatch } from '../training/loss.ts';
import { diffusionSegments } from '../training/objective.ts';
import { isLearned, parameterName, readParameters, wholePart } from '../training/parts.ts';
import {
  type Checkpoint,
  type PartConfigs,
  type PartName,
  type PartWeights,
  partTitles,
} from '../weights/checkpoint.ts';
import type { ProbeTensors } from './probe-tensors.ts';
import { defined, type SamplingFlags } from './values.ts';

/** What a probe works with. */
export interface Probe {
  readonly checkpoint: Checkpoint;
  readonly runtime: Runtime;
  readonly inputs: ProbeTensors;
  readonly signal: AbortSignal;
}

export type ProbeOutputs = Readonly<Record<string, FloatTensor>>;

/** `ids` [batch, positions] -> `hidden`, `pooled` */
export async function probeClip(part: 'clipL' | 'clipG', probe: Probe): Promise<ProbeOutputs> {
  const weights = partOf(probe, part);
  const ids = await probe.inputs.ids('ids', ['batch', weights.config.positions], weights.config.vocabSize);
  return disposing(loadClip(probe.runtime, weights), (encoder) => encoder.encode(ids, probe));
}

/** `ids` [batch, tokens] -> `hidden` */
export async function probeT5(probe: Probe): Promise<ProbeOutputs> {
  const weights = partOf(probe, 't5');
  const ids = await probe.inputs.ids('ids', ['batch', 'tokens'], weights.config.vocabSize);
  const hidden = await disposing(loadT5(probe.runtime, weights), (encoder) => encoder.encode(ids, probe));
  return { hidden };
}

/** `latent`, `timestep` [batch], `context`, `pooled` -> `velocity` */
export async function probeTransformer(
  probe: Probe,
  { skipLayers = [] }: { readonly skipLayers?: readonly number[] },
): Promise<ProbeOutputs> {
  const weights = partOf(probe, 'transformer');
  const latent = await latentInput('latent', probe, weights.config);
  const timestep = await probe.inputs.floats('timestep', ['batch']);
  const pass = { ...(await conditioning(probe, weights.config)), skipLayers };
  const [velocity] = await disposing(loadTransformer(probe.runtime, weights), (transformer) =>
    transformer.velocities(latent, timestep.data, [pass], probe),
  );
  return { velocity: velocity! };
}

/** `image` [batch, 3, height, width] in [-1, 1] -> `moments` */
export async function probeVaeEncode(probe: Probe): Promise<ProbeOutputs> {
  const weights = partOf(probe, 'vae');
  const image = await probe.inputs.floats('image', ['batch', weights.config.imageChannels, 'height', 'width']);
  const unit = vaeDownscale(weights.config);
  const [, , height, width] = image.shape as [number, number, number, number];
  if (height % unit || width % unit) {
    throw new MmditxError('bad-option', `The image is ${width}x${height}; its sides must be multiples of ${unit}.`);
  }
  const moments = await disposing(loadAutoencoder(probe.runtime, weights), (vae) => vae.encode(image, probe));
  return { moments };
}

/** `latent` in the transformer's scale -> `image` */
export async function probeVaeDecode(probe: Probe): Promise<ProbeOutputs> {
  const weights = partOf(probe, 'vae');
  const latent = await probe.inputs.floats('latent', ['batch', weights.config.latentChannels, 'height', 'width']);
  const image = await disposing(loadAutoencoder(probe.runtime, weights), (vae) => vae.decode(latent, probe));
  return { image };
}

export interface SampleFlags extends SamplingFlags {
  /** Skip-layer guidance is on when it is given. */
  readonly slgLayers?: readonly number[];
  /** Of the noise that stochastic samplers draw. */
  readonly seed?: number | bigint;
}

/** `noise` (of variance 1), `context`, `pooled`, `negative_context`, `negative_pooled` -> `latent` */
export async function probeSample(probe: Probe, flags: SampleFlags): Promise<ProbeOutputs> {
  const { runtime, signal } = probe;
  const weights = partOf(probe, 'transformer');
  const defaults = modelDefaults(weights.metadata, weights.file);
  const { steps = defaults.steps, cfg = defaults.cfg, shift = defaults.shift, slgLayers: layers } = flags;
  const window = defined({
    layers,
    scale: flags.slgScale,
    start: flags.slgStart,
    end: flags.slgEnd,
    rule: flags.slgRule,
  });

  const noise = await latentInput('noise', probe, weights.config);
  const positive = await conditioning(probe, weights.config);
  const negative = cfg === 1 ? positive : await conditioning(probe, weights.config, 'negative_');
  const sigmas = scheduleSigmas(flags.scheduler ?? defaults.schedule, steps, { shift });
  const sampler = samplers[flags.sampler ?? defaults.sampler];
  return disposing(loadTransformer(runtime, weights), async (transformer) => {
    const denoise = guidedDenoiser({
      velocity: velocityModel(transformer, positive, negative),
      shape: noise.shape,
      cfg,
      steps,
      shift,
      // As in generate, any option of skip-layer guidance switches it on.
      ...(Object.keys(window).length > 0 && { skipLayer: { ...defaults.skipLayer, ...window } }),
      signal,
    });
    let latent: Float32Array = noise.data.map((value) => value * sigmas[0]!);
    const fresh = samplerNoise(flags.seed ?? 0, latent.length);
    for await (const step of sampler(denoise, latent, sigmas, { noise: fresh, shift, signal })) latent = step.latent;
    return { latent: floats(noise.shape, latent) };
  });
}

/**
 * `latent` (clean), `noise`, `sigma` [batch], `context`, `pooled` -> `loss` [1] and, of every parameter but the table of
 * positions, which is never trained, `grad.<name in the file, without its prefix>`
 */
export async function probeGradient(probe: Probe): Promise<ProbeOutputs> {
  const { inputs, runtime, signal } = probe;
  const part = partOf(probe, 'transformer');
  const { config } = part;
  const latent = await latentInput('latent', probe, config);
  const noise = await latentInput('noise', probe, config);
  const sigma = await inputs.floats('sigma', ['batch']);
  const [items, , height, width] = latent.shape as [number, number, number, number];
  const text = await conditioning(probe, config, '', items);

  const values = await readParameters('transformer', part);
  const segments = diffusionSegments({ config, transformer: wholePart('transformer', values) });
  const source = gradientSource(runtime, segments, isLearned);
  const batch = {
    ...flowBatch(latent, noise, sigma.data, config),
    ...text,
    corner: centreCorner(config.tableSize, height / config.patchSize, width / config.patchSize),
  };
  const { loss, gradients } = await disposing(source, () => source.compute(batch, values));
  signal.throwIfAborted();
  const prefix = parameterName('transformer', '');
  return {
    loss: floats([1], [loss]),
    ...Object.fromEntries(
      [...gradients].map(([name, data]) => [
        `grad.${name.slice(prefix.length)}`,
        floats(values.get(name)!.shape, data),
      ]),
    ),
  };
}

/** More values than this are refused: 1 GiB of them. */
const MAX_NOISE = 2 ** 28;

/** The noise that a seed stands for. */
export function probeNoise({ seed, shape }: { readonly seed: number | bigint; readonly shape: readonly number[] }) {
  const count = elementCount(shape);
  if (count > MAX_NOISE) {
    throw new MmditxError(
      'bad-option',
      `Noise of shape ${shape.join('x')} has more than ${MAX_NOISE} values; give less.`,
    );
  }
  return { noise: floats(shape, torchGenerator(seed).normal(count)) };
}

/** One of the networks in the files; the probe fails when they lack it. */
function partOf<Part extends PartName>({ checkpoint }: Probe, part: Part): PartWeights<PartConfigs[Part]> {
  const weights = checkpoint.parts[part];
  if (weights) return weights as PartWeights<PartConfigs[Part]>;
  const files = checkpoint.files.map(({ source }) => source.name).join(', ');
  throw new MmditxError('missing-part', `There is no ${partTitles[part]} in ${files}; add the file that holds it.`);
}

/** A latent or its noise, which must fit the patches and the table of positions. */
async function latentInput(name: string, { inputs }: Probe, config: TransformerConfig): Promise<FloatTensor> {
  const tensor = await inputs.floats(name, ['batch', config.inChannels, 'height', 'width']);
  const [, , ...sides] = tensor.shape;
  const largest = config.patchSize * config.tableSize;
  if (sides.some((side) => side % config.patchSize || side > largest)) {
    throw new MmditxError(
      'bad-option',
      `The tensor "${name}" is ${sides.join('x')}; this model takes multiples of ${config.patchSize} up to ${largest}.`,
    );
  }
  return tensor;
}

/** `context` and `pooled`; given `batch`, one for each item. */
async function conditioning({ inputs }: Probe, config: TransformerConfig, prefix = '', batch?: number) {
  const items = batch ?? 'batch or 1';
  const context = await inputs.floats(`${prefix}context`, [items, `${prefix}tokens`, config.contextWidth]);
  const pooled = await inputs.floats(`${prefix}pooled`, [items, config.pooledWidth]);
  return { context, pooled };
}

/** Does something with a network and gives its memory back. */
async function disposing<Network extends { dispose(): Promise<void> }, Result>(
  network: Network,
  work: (network: Network) => Promise<Result>,
): Promise<Result> {
  try {
    return await work(network);
  } finally {
    await network.dispose();
  }
}
