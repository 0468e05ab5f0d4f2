/** A stage that trains the autoencoder on the pixels of pictures. */

import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { MmditxError } from '../errors.ts';
import { joinBatches } from '../models/batches.ts';
import { LOG_VARIANCE_RANGE, type VaeConfig, vaeDownscale } from '../models/config.ts';
import { encodeMoments, imageInput } from '../models/vae.ts';
import type { Runtime } from '../runtime/runtime.ts';
import type { TorchGenerator } from '../sampling/noise.ts';
import { elementCount, type FloatTensor, floats } from '../tensor/data.ts';
import { partTitles } from '../weights/checkpoint.ts';
import { writeSafetensorsFile } from '../weights/files.node.ts';
import { configMetadata } from '../weights/metadata.ts';
import {
  batchOrder,
  drawView,
  type Entry,
  INITIAL_STREAM,
  STEP_STREAM,
  stepRandom,
  VALIDATION_STREAM,
} from './batches.ts';
import type { AutoencoderStage, PictureSize, TrainConfig } from './config.ts';
import { gradientSource, LOSS, type Parameters } from './gradients.ts';
import { initialValue } from './initial.ts';
import { autoencoderLoss, READOUTS, readoutTensors } from './loss.ts';
import type { TrainingModel } from './model.node.ts';
import { parameterName, readParameters, wholePart } from './parts.ts';
import { renderPicture } from './pictures.node.ts';
import type { StageWork } from './stage.node.ts';
import { createTrainer } from './trainer.ts';
import { threadedUpdater } from './updates.node.ts';

export interface AutoencoderWorkOptions {
  readonly config: TrainConfig;
  readonly stage: AutoencoderStage;
  readonly index: number;
  readonly model: TrainingModel;
  readonly runtime: Runtime;
  readonly training: readonly Entry[];
}

export interface AutoencoderWork extends Omit<StageWork, 'sample'> {
  write(folder: string): Promise<{ readonly parts: string[] }>;
  dispose(): Promise<void>;
}

export async function autoencoderWork(options: AutoencoderWorkOptions): Promise<AutoencoderWork> {
  const { config, stage, index, model, runtime, training } = options;
  const vae = model.parts.vae;
  if (!vae) throw new MmditxError('missing-part', `The model has no ${partTitles.vae}; add its file to "model".`);
  const values = await readParameters('vae', vae);
  const random = stepRandom(config.seed, INITIAL_STREAM, index);
  for (const [name, shape] of readoutTensors(vae.config)) {
    values.set(
      parameterName('vae', name),
      initialValue(name, shape, (count) => random.normal(count)),
    );
  }
  const part = wholePart('vae', values);
  const { loss, pixels, divergence } = autoencoderLoss(vae.config, part.weights, stage.loss);
  const [decoder, readouts] = [parameterName('vae', 'decoder.'), parameterName('vae', READOUTS)] as const;
  const source = gradientSource(
    runtime,
    [{ outputs: { [LOSS]: loss, pixels, divergence }, compile: part.compile }],
    (name) => stage.only === 'all' || name.startsWith(decoder) || name.startsWith(readouts),
  );
  const trainer = createTrainer(source, {
    values,
    optimizer: stage.optimizer,
    clip: stage.clip,
    averageDecay: stage.average?.decay,
    averageEvery: stage.average?.every,
    updater: threadedUpdater(),
  });
  const order = batchOrder(training, stage.batch, config.seed + index);
  const pictures = renderedPictures();
  const unit = vaeDownscale(vae.config);
  requireSizes(training, stage, unit);

  return {
    trainer,
    async batchAt(batchIndex) {
      const { epoch, entries } = order.at(batchIndex);
      const random = stepRandom(config.seed, STEP_STREAM, index, batchIndex);
      const images: FloatTensor[] = [];
      for (const entry of entries) {
        const image = await pictures(entry, random);
        images.push(stage.crop === undefined ? image : randomCrop(image, stage.crop, random));
      }
      const image = joinBatches(images);
      const [items, , height, width] = image.shape as [number, number, number, number];
      const latent = [items, vae.config.latentChannels, height / unit, width / unit];
      const batch = { image, noise: floats(latent, random.normal(elementCount(latent))) };
      return { batch, names: entries.map(({ picture }) => picture.name), size: [width, height], epoch };
    },
    async write(folder) {
      const current: Parameters = new Map([...values, ...trainer.average]);
      if (stage.normalize) await normalizeLatents(current, vae.config, runtime, training, config.seed);
      await mkdir(folder, { recursive: true });
      const path = join(folder, 'vae.safetensors');
      const readout = parameterName('vae', READOUTS);
      const own = [...current].filter(([name]) => !name.startsWith(readout));
      await writeSafetensorsFile(path, new Map(own), configMetadata({ vae: vae.config }));
      return { parts: [path] };
    },
    dispose: () => source.dispose(),
  };
}

/** Memory that rendered pictures may take, as bytes of pixels. */
const RENDERED_BYTES = 2 ** 30;

/** Renders pictures, keeping those it has room for: decoding a picture costs more than a step of a small model. */
function renderedPictures(): (entry: Entry, random: TorchGenerator) => Promise<FloatTensor> {
  const kept = new Map<string, { shape: readonly number[]; bytes: Uint8Array }>();
  let total = 0;
  return async (entry, random) => {
    const view = drawView(entry, random, { cached: true });
    const key = JSON.stringify([entry.picture.path, view]);
    const known = kept.get(key);
    if (known) {
      return floats(
        known.shape,
        Float32Array.from(known.bytes, (byte) => byte / 127.5 - 1),
      );
    }
    const image = await renderPicture(entry.picture, view);
    if (total + image.data.length <= RENDERED_BYTES) {
      total += image.data.length;
      const bytes = Uint8Array.from(image.data, (value) => Math.round((value + 1) * 127.5));
      kept.set(key, { shape: image.shape, bytes });
    }
    return image;
  };
}

/** A square of some side from anywhere in [1, channels, height, width]; all of it along sides that are no longer. */
function randomCrop({ shape, data }: FloatTensor, side: number, random: TorchGenerator): FloatTensor {
  const [, channels, height, width] = shape as [number, number, number, number];
  const [rows, columns] = [Math.min(side, height), Math.min(side, width)];
  const [top] = random.integers(0, height - rows + 1, 1) as [number];
  const [left] = random.integers(0, width - columns + 1, 1) as [number];
  const crop = new Float32Array(channels * rows * columns);
  for (let row = 0; row < channels * rows; row++) {
    const channel = Math.floor(row / rows);
    const start = (channel * height + top + (row % rows)) * width + left;
    crop.set(data.subarray(start, start + columns), row * columns);
  }
  return floats([1, channels, rows, columns], crop);
}

function requireSizes(entries: readonly Entry[], { crop }: AutoencoderStage, unit: number): void {
  const wrong = entries.find(({ size }) => size.some((side) => Math.min(side, crop ?? side) % unit !== 0));
  if (!wrong) return;
  const size: PictureSize = wrong.size;
  throw new MmditxError(
    'bad-option',
    `Data set "${wrong.dataset}" has pictures of ${size.join('x')} pixels${crop === undefined ? '' : `, cropped to ${crop}`}; ` +
      `sides must be multiples of ${unit}.`,
  );
}

/** Of a channel that carries nothing. */
const SMALLEST_DEVIATION = 1e-6;
/** Pictures that the scale of latents is measured on. */
const SCALE_PICTURES = 200;

/**
 * Scales each latent channel, in the encoder's last layer and against it in the decoder's first, so that its standard
 * deviation over pictures is 1 / latentScale, as that of the released autoencoder.
 */
async function normalizeLatents(
  values: Parameters,
  config: VaeConfig,
  runtime: Runtime,
  entries: readonly Entry[],
  seed: number,
): Promise<void> {
  const part = wholePart('vae', values);
  const moments = encodeMoments(config, part.weights, imageInput(config));
  const executable = await runtime.compile({ outputs: { moments } }, part.compile);
  const random = stepRandom(seed, VALIDATION_STREAM);
  const chosen = [...random.permutation(entries.length)].slice(0, SCALE_PICTURES).map((i) => entries[i]!);
  const sums = new Float64Array(config.latentChannels);
  const squares = new Float64Array(config.latentChannels);
  let count = 0;
  for (const entry of chosen) {
    const image = await renderPicture(entry.picture, drawView(entry, random, { cached: true }));
    const { shape, data } = (await executable.run({ image })).moments as FloatTensor;
    const pixels = shape[2]! * shape[3]!;
    for (let channel = 0; channel < config.latentChannels; channel++) {
      for (let i = 0; i < pixels; i++) {
        const value = data[channel * pixels + i]!;
        sums[channel]! += value;
        squares[channel]! += value * value;
      }
    }
    count += pixels;
  }
  await executable.dispose();
  const deviations = [...sums].map((sum, i) =>
    Math.max(Math.sqrt(Math.max(squares[i]! / count - (sum / count) ** 2, 0)), SMALLEST_DEVIATION),
  );
  rescaleLatents(
    values,
    config,
    deviations.map((deviation) => 1 / (config.latentScale * deviation)),
  );
}

/** Multiplies each latent channel by a factor, without a change of what is decoded. */
function rescaleLatents(values: Parameters, { latentChannels }: VaeConfig, factors: readonly number[]): void {
  const at = (name: string) => values.get(parameterName('vae', name))!;
  const kernel = at('encoder.conv_out.weight');
  const bias = at('encoder.conv_out.bias');
  const inputs = at('decoder.conv_in.weight');
  const perRow = elementCount(kernel.shape.slice(1));
  const [out, channels, side] = inputs.shape as [number, number, number];
  // The decoder takes latents as the encoder gives them, so that a shift of its mean needs no change here.
  for (const [channel, factor] of factors.entries()) {
    for (let i = 0; i < perRow; i++) kernel.data[channel * perRow + i]! *= factor;
    bias.data[channel]! *= factor;
    bias.data[latentChannels + channel] = Math.min(
      bias.data[latentChannels + channel]! + 2 * Math.log(factor),
      LOG_VARIANCE_RANGE[1],
    );
    for (let row = 0; row < out; row++) {
      for (let i = 0; i < side * side; i++) inputs.data[(row * channels + channel) * side * side + i]! /= factor;
    }
  }
}
