/** A stage that trains the transformer, and text encoders where asked: whole, or as a LoRA. */

import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { MmditxError } from '../errors.ts';
import { latentOf } from '../models/autoencoder.ts';
import { joinBatches } from '../models/batches.ts';
import { endOfText } from '../models/clip.ts';
import type { ClipConfig, TransformerConfig } from '../models/config.ts';
import { centreCorner } from '../models/mmditx.ts';
import { relativeBuckets } from '../models/t5.ts';
import type { Runtime } from '../runtime/runtime.ts';
import type { TorchGenerator } from '../sampling/noise.ts';
import { elementCount, type FloatTensor, floats, type TensorData } from '../tensor/data.ts';
import { input } from '../tensor/index.ts';
import { clipTokenizer, t5Tokenizer } from '../text/tokenizer.ts';
import { type PartName, type PartWeights, partTitles } from '../weights/checkpoint.ts';
import { partPrefixes } from '../weights/convert.ts';
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
import type { DiffusionStage, PictureSize, TrainConfig } from './config.ts';
import { entryCaption } from './datasets.node.ts';
import { type Encodings, joinEncodedText } from './encodings.node.ts';
import { type Batch, gradientSource, type Parameters } from './gradients.ts';
import { loadLoraValues, writeLora } from './lora-values.node.ts';
import { flowBatch } from './loss.ts';
import { extendedPositions, type TrainingModel } from './model.node.ts';
import { diffusionSegments, type TrainedEncoders } from './objective.ts';
import {
  type AdaptedLayer,
  adaptedLayers,
  adaptedPart,
  frozenPart,
  initialLora,
  isLearned,
  KEPT_RANKS,
  parameterName,
  readParameters,
  type TrainedPart,
  type Training,
  wholePart,
} from './parts.ts';
import type { StageWork } from './stage.node.ts';
import { drawSigmas, lossWeights, trainingShift, validationSigmas } from './timesteps.ts';
import { createTrainer } from './trainer.ts';
import { threadedUpdater } from './updates.node.ts';

export interface DiffusionOptions {
  readonly config: TrainConfig;
  readonly stage: DiffusionStage;
  readonly index: number;
  readonly model: TrainingModel;
  readonly runtime: Runtime;
  readonly training: readonly Entry[];
  readonly heldOut: readonly Entry[];
  /** Latents, and texts where the encoders are frozen. */
  readonly encodings: Encodings;
  /** Whether latents come from a cache, which holds only some crops. */
  readonly cached: boolean;
  readonly resolve: (path: string) => string;
}

/** A diffusion stage, and how its result is written. */
export interface DiffusionWork extends Omit<StageWork, 'sample'> {
  /**
   * Writes what was trained, with averaged weights: a file for each network trained whole, and one LoRA.
   * @returns the paths
   */
  write(folder: string): Promise<{ readonly parts: string[]; readonly lora?: string }>;
  dispose(): Promise<void>;
}

/** Share in which each text encoder is dropped in pretraining (SD3 paper, appendix B.1). */
const PRETRAINING_DROPOUT = 0.464;

const ENCODERS = ['clipL', 'clipG', 't5'] as const;

export async function diffusionWork(options: DiffusionOptions): Promise<DiffusionWork> {
  const { config, stage, index, model, runtime, training, heldOut, encodings, cached } = options;
  const vae = requirePart(model, 'vae');
  const trainsText = stage.textEncoders !== 'frozen';
  const modes: Partial<Record<PartName, Training>> = {
    transformer: stage.transformer,
    ...(trainsText && Object.fromEntries(ENCODERS.map((part) => [part, stage.textEncoders]))),
  };
  const { layers, values, trainedNames, partOf, transformerConfig } = await prepareParameters(options, modes);
  const encoders = trainsText ? trainedEncoders(model, partOf) : undefined;
  const weighted = stage.noise.weighting.kind !== 'none' || stage.noise.weighting.preconditioned;
  const segments = diffusionSegments({
    config: transformerConfig,
    transformer: partOf('transformer'),
    encoders,
    checkpointing: stage.checkpointing,
    weighted,
    attentionLogits: stage.attentionLogits,
  });
  const source = gradientSource(runtime, segments, (name) => trainedNames(name));
  const trainer = createTrainer(source, {
    values,
    optimizer: stage.optimizer,
    clip: stage.clip,
    averageDecay: stage.average?.decay,
    averageEvery: stage.average?.every,
    updater: threadedUpdater(),
  });
  // The paper's rate where the transformer begins from nothing.
  const dropout = stage.text.encoderDropout ?? (config.networks?.transformer ? PRETRAINING_DROPOUT : 0);
  const order = batchOrder(training, stage.batch, config.seed + index);
  const textInputs = encoders && textIds(model, encoders);

  /** Everything but noise: latents and text of some entries. */
  const shown = async (entries: readonly Entry[], random: TorchGenerator, dropout: number) => {
    const views = entries.map((entry) => drawView(entry, random, { cached }));
    const captions = entries.map((entry) => entryCaption(entry, random));
    const keep = Object.fromEntries(
      ENCODERS.map((part) => [part, [...random.uniform(entries.length)].map((draw) => draw >= dropout)]),
    ) as Record<(typeof ENCODERS)[number], boolean[]>;
    const moments = await encodings.latents(entries.map(({ picture }, i) => ({ picture, view: views[i]! })));
    const all = joinBatches(moments);
    const [items, doubled, ...sides] = all.shape as [number, number, number, number];
    const shape = [items, doubled / 2, ...sides];
    const noise = stage.posterior === 'sample' ? floats(shape, random.normal(elementCount(shape))) : undefined;
    const latent = latentOf(all, vae.config, noise);
    const text: Batch = textInputs
      ? { ...textInputs(captions), ...keptInputs(keep) }
      : await frozenText(captions, keep, encodings, transformerConfig);
    return { latent, text };
  };

  /** Draws noise onto latents. */
  const noised = (latent: FloatTensor, sigma: Float32Array, random: TorchGenerator): Batch => {
    const noise = floats(latent.shape, random.normal(latent.data.length));
    return {
      ...flowBatch(latent, noise, sigma, transformerConfig),
      ...(weighted && { weight: floats([sigma.length], lossWeights(stage.noise.weighting, sigma)) }),
    };
  };

  const kept = (random: TorchGenerator | undefined): Batch => {
    const { rank, dropout } = stage.lora;
    if (dropout === 0 || layers.length === 0) return {};
    const draws = random?.uniform(layers.length * rank);
    const factors = new Float32Array(layers.length * rank).fill(1);
    if (draws) for (let i = 0; i < factors.length; i++) factors[i] = draws[i]! < dropout ? 0 : 1 / (1 - dropout);
    return { [KEPT_RANKS]: floats([layers.length, rank], factors) };
  };

  const gridOf = ([width, height]: PictureSize): [number, number] => {
    const unit = 2 ** (vae.config.multipliers.length - 1) * transformerConfig.patchSize;
    return [height / unit, width / unit];
  };
  requireSizes([...training, ...heldOut], gridOf, transformerConfig.tableSize);

  return {
    trainer,
    async batchAt(batchIndex) {
      const { epoch, entries } = order.at(batchIndex);
      const random = stepRandom(config.seed, STEP_STREAM, index, batchIndex);
      const { latent, text } = await shown(entries, random, dropout);
      const [{ size }] = entries as [Entry];
      const [rows, columns] = gridOf(size);
      const { density, min, max, shift, baseResolution, countedFrom } = stage.noise;
      const base = gridOf([baseResolution, baseResolution]);
      const factor =
        shift === 'resolution'
          ? trainingShift({ kind: 'resolution', baseTokens: base[0] * base[1] }, rows * columns)
          : shift;
      const sigma = drawSigmas(density, entries.length, random, { shift: factor, min, max, countedFrom });
      const batch: Batch = {
        ...noised(latent, sigma, random),
        ...text,
        corner: drawCorner(random, stage.positions.randomCrop, transformerConfig.tableSize, rows, columns),
        ...kept(random),
      };
      return { batch, names: entries.map(({ picture }) => picture.name), size, epoch };
    },
    ...(config.validation && heldOut.length > 0 && { validate }),
    async write(folder) {
      await mkdir(folder, { recursive: true });
      const current: Parameters = new Map([...values, ...trainer.average]);
      const parts: string[] = [];
      for (const [part, mode] of Object.entries(modes) as [PartName, Training][]) {
        if (mode !== 'full') continue;
        const own = [...current].filter(([name]) => name.startsWith(partPrefixes[part]));
        const path = join(folder, `${part}.safetensors`);
        const partConfig = part === 'transformer' ? transformerConfig : model.parts[part]!.config;
        await writeSafetensorsFile(path, new Map(own), configMetadata({ [part]: partConfig }));
        parts.push(path);
      }
      if (layers.length === 0) return { parts };
      const lora = join(folder, `${config.name}.safetensors`);
      const metadata = { ss_output_name: config.name, ss_steps: String(trainer.steps), ss_seed: String(config.seed) };
      await writeLora(lora, layers, current, { config: stage.lora, transformer: transformerConfig, metadata });
      return { parts, lora };
    },
    dispose: () => source.dispose(),
  };

  async function validate() {
    const pictures = new Set<string>();
    const chosen = heldOut
      .filter(({ picture }) => !pictures.has(picture.digest) && pictures.add(picture.digest))
      .slice(0, config.validation!.pictures);
    const groups = batchOrder(chosen, stage.batch, 0);
    const levels = [...validationSigmas()];
    const sums = levels.map(() => 0);
    for (let group = 0; group < groups.perEpoch; group++) {
      const { entries } = groups.at(group);
      const random = stepRandom(config.seed, VALIDATION_STREAM, group);
      const { latent, text } = await shown(entries, random, 0);
      const [rows, columns] = gridOf(entries[0]!.size);
      const noise = stepRandom(config.seed, VALIDATION_STREAM, group, 1);
      const draws = floats(latent.shape, noise.normal(latent.data.length));
      for (const [i, level] of levels.entries()) {
        const sigma = new Float32Array(entries.length).fill(level);
        const batch: Batch = {
          ...flowBatch(latent, draws, sigma, transformerConfig),
          ...(weighted && { weight: floats([entries.length], new Float32Array(entries.length).fill(1)) }),
          ...text,
          corner: centreCorner(transformerConfig.tableSize, rows, columns),
          ...kept(undefined),
        };
        sums[i]! += (await source.loss(batch, trainer.average)) * entries.length;
      }
    }
    return levels.map((sigma, i) => ({ sigma, loss: sums[i]! / chosen.length }));
  }
}

/** What is trained, its initial values, and how each network enters the program. */
async function prepareParameters(
  { config, stage, index, model, resolve }: DiffusionOptions,
  modes: Partial<Record<PartName, Training>>,
) {
  const loraParts = (Object.entries(modes) as [PartName, Training][]).filter(([, mode]) => mode === 'lora');
  const layers: AdaptedLayer[] = loraParts.flatMap(([part]) =>
    part === 'vae' ? [] : adaptedLayers(part, requirePart(model, part), stage.lora),
  );
  if (loraParts.length > 0 && layers.length === 0) {
    throw new MmditxError(
      'bad-option',
      `Stage "${stage.name}" has a LoRA without layers; check lora.targets and lora.blocks.`,
    );
  }
  const random = stepRandom(config.seed, INITIAL_STREAM, index, layers.length);
  const values = initialLora(layers, stage.lora, model.parts, random);
  const from = stage.lora.from !== undefined ? resolve(stage.lora.from) : model.lora;
  if (layers.length > 0 && from !== undefined) await loadLoraValues(from, layers, stage.lora, values);

  let transformerConfig = requirePart(model, 'transformer').config;
  const whole = new Set<string>();
  for (const [part, mode] of Object.entries(modes) as [PartName, Training][]) {
    if (mode !== 'full') continue;
    whole.add(partPrefixes[part]);
    for (const [name, value] of await readParameters(part, requirePart(model, part))) values.set(name, value);
  }
  const side = stage.positions.table;
  if (side !== undefined && side !== transformerConfig.tableSize) {
    if (stage.transformer !== 'full') {
      throw new MmditxError(
        'bad-option',
        `Stage "${stage.name}" extends the position table, which needs transformer: full.`,
      );
    }
    const name = parameterName('transformer', 'pos_embed');
    const grid = stage.positions.grid ?? config.networks?.transformer?.positions;
    values.set(name, extendedPositions(values.get(name)!, transformerConfig, side, grid));
    transformerConfig = { ...transformerConfig, tableSize: side };
  }

  const ofLora = new Set(layers.flatMap(({ down, up }) => [down, up]));
  const trainedNames = (name: string) =>
    ofLora.has(name) || (isLearned(name) && [...whole].some((prefix) => name.startsWith(prefix)));
  const keptRanks =
    stage.lora.dropout > 0 && layers.length > 0
      ? input(KEPT_RANKS, 'float32', [layers.length, stage.lora.rank])
      : undefined;
  const made = new Map<PartName, TrainedPart>();
  const partOf = (part: PartName): TrainedPart => {
    const known = made.get(part);
    if (known) return known;
    const mode = modes[part] ?? 'frozen';
    const source = requirePart(model, part);
    const own =
      mode === 'full'
        ? wholePart(part, values)
        : mode === 'lora'
          ? adaptedPart(part, source, { config: stage.lora, layers, kept: keptRanks })
          : frozenPart(part, source);
    made.set(part, own);
    return own;
  };
  return { layers, values, trainedNames, partOf, transformerConfig };
}

function requirePart<Part extends PartName>(
  { parts }: TrainingModel,
  part: Part,
): NonNullable<TrainingModel['parts'][Part]> & PartWeights<unknown> {
  const found = parts[part];
  if (found) return found as NonNullable<TrainingModel['parts'][Part]> & PartWeights<unknown>;
  throw new MmditxError(
    'missing-part',
    `The model has no ${partTitles[part]}, which this stage needs; add its file to "model".`,
  );
}

function trainedEncoders(model: TrainingModel, partOf: (part: PartName) => TrainedPart): TrainedEncoders {
  return {
    clipL: { config: requirePart(model, 'clipL').config, part: partOf('clipL') },
    clipG: { config: requirePart(model, 'clipG').config, part: partOf('clipG') },
    t5: { config: requirePart(model, 't5').config, part: partOf('t5') },
  };
}

/** Makes the inputs of encoders in the program: one row of tokens for each caption, cut where it is longer. */
function textIds(
  { tokenizers }: TrainingModel,
  { clipL, clipG, t5 }: TrainedEncoders,
): (captions: readonly string[]) => Batch {
  const { clip: clipText, t5: t5Text } = tokenizers;
  if (clipText === undefined || t5Text === undefined) {
    throw new MmditxError(
      'missing-part',
      'Training text encoders needs both tokenizers; name them with clipTokenizer and t5Tokenizer.',
    );
  }
  const words = clipTokenizer(clipText);
  const pieces = t5Tokenizer(t5Text);
  const rows = (
    captions: readonly string[],
    length: number,
    pad: number,
    encode: (text: string) => number[],
    end: number,
  ) => {
    const data = new Int32Array(captions.length * length).fill(pad);
    for (const [item, text] of captions.entries()) data.set([...encode(text).slice(0, length - 1), end], item * length);
    return { dtype: 'int32', shape: [captions.length, length], data } as const;
  };
  return (captions) => {
    const clipRows = ({ positions, padId }: ClipConfig) =>
      rows(captions, positions, padId, (text) => [words.start, ...words.encode(text)], words.end);
    const [idsL, idsG] = [clipRows(clipL.config), clipRows(clipG.config)];
    return {
      'clipL.ids': idsL,
      'clipL.end': endOfText(idsL.data, clipL.config),
      'clipG.ids': idsG,
      'clipG.end': endOfText(idsG.data, clipG.config),
      't5.ids': rows(captions, t5.config.tokens, pieces.pad, (text) => pieces.encode(text), pieces.end),
      't5.buckets': relativeBuckets(t5.config.tokens, t5.config),
    };
  };
}

function keptInputs(keep: Readonly<Record<(typeof ENCODERS)[number], readonly boolean[]>>): Batch {
  const entries = ENCODERS.map((part) => {
    const flags = keep[part];
    return [
      `${part}.keep`,
      floats(
        [flags.length, 1],
        flags.map((kept) => (kept ? 1 : 0)),
      ),
    ] as const;
  });
  return Object.fromEntries(entries);
}

/** Text from encoders that stay as they are, each left out where it is dropped. */
async function frozenText(
  captions: readonly string[],
  keep: Readonly<Record<(typeof ENCODERS)[number], readonly boolean[]>>,
  encodings: Encodings,
  widths: Pick<TransformerConfig, 'contextWidth' | 'pooledWidth'>,
): Promise<Batch> {
  const encoded = await encodings.texts(captions);
  const joined = encoded.map((text, i) =>
    joinEncodedText(text, { clipL: keep.clipL[i]!, clipG: keep.clipG[i]!, t5: keep.t5[i]! }, widths),
  );
  return {
    context: joinBatches(joined.map(({ context }) => context)),
    pooled: joinBatches(joined.map(({ pooled }) => pooled)),
  };
}

/** Where in the position table a batch lies: in the middle, or anywhere (SD3.5 model card; kohya's `pos_emb_random_crop_rate`). */
function drawCorner(random: TorchGenerator, rate: number, table: number, rows: number, columns: number): TensorData {
  if (rate === 0 || random.uniform(1)[0]! >= rate) return centreCorner(table, rows, columns);
  const [top] = random.integers(0, table - rows + 1, 1);
  const [left] = random.integers(0, table - columns + 1, 1);
  return { dtype: 'int64', shape: [2], data: BigInt64Array.of(BigInt(top!), BigInt(left!)) };
}

function requireSizes(entries: readonly Entry[], gridOf: (size: PictureSize) => [number, number], table: number): void {
  for (const { size, dataset } of entries) {
    const grid = gridOf(size);
    if (grid.some((side) => !Number.isInteger(side) || side > table)) {
      throw new MmditxError(
        'bad-option',
        `Data set "${dataset}" has pictures of ${size.join('x')} pixels; sides must be whole patches, at most ${table} of them.`,
      );
    }
  }
}
