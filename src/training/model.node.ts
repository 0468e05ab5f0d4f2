/** The model that a training run works on: what lies in files, what earlier stages made, and what begins at random. */

import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { mkdir, stat } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { MmditxError } from '../errors.ts';
import { CLIP_G, CLIP_L, SD3_VAE, SD35_MEDIUM_TRANSFORMER, T5_XXL, type TransformerConfig } from '../models/config.ts';
import { modelIdentity } from '../pipeline/identity.ts';
import { openFiles, readTokenizers } from '../pipeline/open.node.ts';
import { type FloatTensor, toFloat16 } from '../tensor/data.ts';
import { clipTokenizer } from '../text/tokenizer.ts';
import { writeFileAtomically } from '../weights/atomic.node.ts';
import {
  type Checkpoint,
  findMismatch,
  type PartConfigs,
  type PartName,
  type PartWeights,
  partNames,
  partTitles,
} from '../weights/checkpoint.ts';
import { partPrefixes } from '../weights/convert.ts';
import { type ConversionOptions, convertParts } from '../weights/converted.node.ts';
import { clipTensors, type TensorShapes, t5Tensors, transformerTensors, vaeTensors } from '../weights/expected.ts';
import { writeSafetensorsFile } from '../weights/files.node.ts';
import { CLIP_TOKENIZER_KEY, configMetadata, T5_TOKENIZER_KEY } from '../weights/metadata.ts';
import { type PlannedTensors, plannedSafetensorsChunks } from '../weights/safetensors.ts';
import { readFloats } from '../weights/stored.ts';
import { INITIAL_STREAM, stepRandom } from './batches.ts';
import type { NetworksConfig, TrainConfig } from './config.ts';
import type { Parameters } from './gradients.ts';
import { initialValue, type PositionTableOptions, positionTable } from './initial.ts';

export interface TrainingModel {
  readonly parts: Checkpoint['parts'];
  /** The same networks as they lie in files, where `parts` are in the precision of frozen weights. */
  readonly stored: Checkpoint['parts'];
  /** Tells models apart; null where the run begins from nothing. */
  readonly identity: string | null;
  readonly files: Checkpoint['files'];
  readonly tokenizers: Checkpoint['tokenizers'];
  /** The LoRA of an earlier stage, from which the next one goes on. */
  readonly lora?: string;
  close(): Promise<void>;
}

/** The model that a configuration begins with. */
export async function openModel(
  config: TrainConfig,
  resolve: (path: string) => string,
  onNote: (text: string) => void,
  onProgress?: ConversionOptions['onProgress'],
): Promise<TrainingModel> {
  const tokenizers = {
    ...(config.clipTokenizer !== undefined && { clipTokenizer: resolve(config.clipTokenizer) }),
    ...(config.t5Tokenizer !== undefined && { t5Tokenizer: resolve(config.t5Tokenizer) }),
  };
  if (config.model === undefined) {
    const none = { parts: {}, stored: {}, files: [], tokenizers: {}, identity: null };
    const texts = await readTokenizers(none, process.cwd(), tokenizers);
    return { ...none, tokenizers: texts, close: async () => undefined };
  }
  const paths = [config.model].flat().map(resolve);
  const { checkpoint, close } = await openFiles(paths, { onNote });
  const home = (await stat(paths[0]!)).isDirectory() ? paths[0]! : dirname(paths[0]!);
  const found = await readTokenizers(checkpoint, home, tokenizers);
  const kept = keptParts(checkpoint, config.networks);
  const texts = { ...checkpoint.tokenizers, ...found };
  const identity = (await modelIdentity(checkpoint)).hash;
  const base = { ...checkpoint, parts: kept, stored: kept, tokenizers: texts, identity, close };
  if (config.precision === undefined || config.precision === 'fp32') return base;
  // What is trained whole must begin from its own values.
  const wanted = partNames.filter((part) => part !== 'vae' && kept[part] && !isTrainedWhole(part, config));
  const converted = await convertParts({ ...checkpoint, parts: kept }, wanted, config.precision, { onProgress });
  return {
    ...base,
    parts: converted.checkpoint.parts,
    files: converted.checkpoint.files,
    close: async () => void (await Promise.all([converted.close(), close()])),
  };
}

function isTrainedWhole(part: PartName, { stages }: Pick<TrainConfig, 'stages'>): boolean {
  return stages.some(
    (stage) =>
      stage.train === 'diffusion' && (part === 'transformer' ? stage.transformer : stage.textEncoders) === 'full',
  );
}

/** The networks of files that are not to begin anew. */
function keptParts({ parts }: Checkpoint, networks: NetworksConfig | undefined): Checkpoint['parts'] {
  return Object.fromEntries(Object.entries(parts).filter(([part]) => !networks?.[part as PartName]));
}

/** The model with networks from a file in place of its own. */
export async function withFile(model: TrainingModel, path: string): Promise<TrainingModel> {
  const { checkpoint, close } = await openFiles([path]);
  const parts = { ...model.parts, ...checkpoint.parts };
  const mismatch = findMismatch(parts);
  if (mismatch) {
    await close();
    throw mismatch;
  }
  return {
    ...model,
    parts,
    stored: { ...model.stored, ...checkpoint.parts },
    files: [...checkpoint.files, ...model.files],
    close: async () => void (await Promise.all([close(), model.close()])),
  };
}

/**
 * The model with a network that no file has, made as the configuration says: random weights from the run's seed, written
 * to `folder` so that they are read like any others.
 * @throws MmditxError `missing-part` where the configuration does not describe it
 */
export async function withPart(
  model: TrainingModel,
  part: PartName,
  { networks, seed }: Pick<TrainConfig, 'networks' | 'seed'>,
  folder: string,
): Promise<TrainingModel> {
  if (model.parts[part]) return model;
  if (!networks?.[part]) {
    throw new MmditxError(
      'missing-part',
      `The model has no ${partTitles[part]}, which this stage needs; add its file to "model" or describe it in "networks".`,
    );
  }
  const configs = freshConfigs(networks, model);
  const positions = part === 'transformer' ? (networks.transformer?.positions ?? SD3_GRID) : null;
  const digest = createHash('sha256')
    .update(JSON.stringify([seed, configs[part], positions]))
    .digest('hex');
  const path = join(folder, `${part}-${digest.slice(0, DIGEST_DIGITS)}.safetensors`);
  // Made when the run was begun: always the same.
  if (existsSync(path)) return withFile(model, path);
  const shapes = tensorShapes(part, configs);
  const random = stepRandom(seed, INITIAL_STREAM, partNames.indexOf(part));
  const values: Parameters = new Map();
  for (const [name, shape] of shapes) {
    const value = name === 'pos_embed' ? freshPositions(configs.transformer, networks) : undefined;
    values.set(partPrefixes[part] + name, value ?? initialValue(name, shape, (count) => random.normal(count)));
  }
  await mkdir(folder, { recursive: true });
  await writeSafetensorsFile(path, values, configMetadata({ [part]: configs[part] }));
  return withFile(model, path);
}

const DIGEST_DIGITS = 12;

function tensorShapes(part: PartName, configs: PartConfigs): TensorShapes {
  switch (part) {
    case 'transformer':
      return transformerTensors(configs.transformer);
    case 'vae':
      return vaeTensors(configs.vae);
    case 'clipL':
    case 'clipG':
      return clipTensors(configs[part]);
    case 't5':
      return t5Tensors(configs.t5);
  }
}

/** Stable Diffusion 3.5 Medium, changed where the configuration says so. */
function freshConfigs(networks: NetworksConfig, { tokenizers, parts }: TrainingModel): PartConfigs {
  const { clipL, clipG } = networks;
  const { positions: _, ...transformerChanges } = stated(networks.transformer);
  const words = vocabularies(tokenizers);
  const clipOf = (base: typeof CLIP_L, changes: NetworksConfig['clipL']) => {
    const width = changes?.width ?? base.width;
    const { mlpWidth = 4 * width, ...own } = stated(changes);
    const ids = words.clip && { vocabSize: words.clip.end + 1, bosId: words.clip.start, eosId: words.clip.end };
    const padId = base.padId === base.eosId && ids ? ids.eosId : base.padId;
    return { ...base, pooledWidth: width, ...own, width, mlpWidth, ...ids, padId };
  };
  const left = parts.clipL?.config ?? clipOf(CLIP_L, clipL);
  const right = parts.clipG?.config ?? clipOf(CLIP_G, clipG);
  const clipWidth = left.pooledWidth + right.pooledWidth;
  const known = parts.t5?.config.width ?? parts.transformer?.config.contextWidth;
  const t5Width = known ?? (clipL || clipG ? clipWidth : T5_XXL.width);
  const hiddenSize = transformerChanges.hiddenSize ?? SD35_MEDIUM_TRANSFORMER.hiddenSize;
  const heads = transformerChanges.heads ?? SD35_MEDIUM_TRANSFORMER.heads;
  return {
    clipL: left,
    clipG: right,
    t5: parts.t5?.config ?? {
      ...T5_XXL,
      mlpWidth: 2 * t5Width,
      ...stated(networks.t5),
      width: t5Width,
      ...(words.t5 !== undefined && { vocabSize: words.t5 }),
    },
    vae: parts.vae?.config ?? { ...SD3_VAE, ...stated(networks.vae) },
    transformer: parts.transformer?.config ?? {
      ...SD35_MEDIUM_TRANSFORMER,
      mlpHidden: 4 * hiddenSize,
      ...transformerChanges,
      headDim: hiddenSize / heads,
      contextWidth: t5Width,
      pooledWidth: clipWidth,
    },
  };
}

/** The fields that have values. */
function stated<T extends object>(changes: T | undefined): { [Key in keyof T]?: Exclude<T[Key], undefined> } {
  const entries = Object.entries(changes ?? {}).filter(([, value]) => value !== undefined);
  return Object.fromEntries(entries) as { [Key in keyof T]?: Exclude<T[Key], undefined> };
}

function vocabularies({ clip, t5 }: Checkpoint['tokenizers']) {
  return {
    clip: clip === undefined ? undefined : clipTokenizer(clip),
    t5: t5 === undefined ? undefined : (JSON.parse(t5) as { model: { vocab: unknown[] } }).model.vocab.length,
  };
}

/** Positions of Stable Diffusion 3: the middle 64 x 64 patches (1024 pixels) span 0 to 16. */
const SD3_GRID = { grid: 64, span: 16 };

function freshPositions(config: TransformerConfig, { transformer }: NetworksConfig): FloatTensor {
  return positionTable(config, transformer?.positions ?? SD3_GRID);
}

/**
 * A transformer whose position table has a larger side: its own values in the middle, continued outwards on the same
 * grid, so that what was learned with the smaller one holds.
 */
export function extendedPositions(
  table: FloatTensor,
  config: TransformerConfig,
  side: number,
  grid: PositionTableOptions = SD3_GRID,
): FloatTensor {
  const { hiddenSize, tableSize } = config;
  if (side < tableSize || (side - tableSize) % 2 !== 0) {
    throw new MmditxError(
      'bad-option',
      `The position table has ${tableSize} x ${tableSize} patches; positions.table must be larger by an even number.`,
    );
  }
  const own = positionTable({ hiddenSize, tableSize }, grid).data;
  if (own.some((value, i) => Math.abs(value - table.data[i]!) > HALF_PRECISION_ERROR)) {
    throw new MmditxError(
      'bad-option',
      `The model was made with other positions than ${grid.grid} patches over 0 to ${grid.span}; give its own as positions.grid and positions.span.`,
    );
  }
  const wide = positionTable({ hiddenSize, tableSize: side }, grid);
  const start = (side - tableSize) / 2;
  for (let row = 0; row < tableSize; row++) {
    const from = row * tableSize * hiddenSize;
    wide.data.set(
      table.data.subarray(from, from + tableSize * hiddenSize),
      ((start + row) * side + start) * hiddenSize,
    );
  }
  return wide;
}

/** Of a sine stored in 16 bits, with room. */
const HALF_PRECISION_ERROR = 2e-3;

/** The tensors of a network in floating point, each read when its turn comes. */
function exportedTensors(
  part: PartName,
  source: PartWeights<unknown> | undefined,
  precision: 'fp32' | 'fp16',
): PlannedTensors[] {
  const dtype = precision === 'fp32' ? 'float32' : 'float16';
  return [...(source?.tensors ?? [])].map(([name, weight]) => ({
    tensors: new Map([[partPrefixes[part] + name, { dtype, shape: weight.shape }]]),
    async values() {
      const { data } = await readFloats(weight);
      return [precision === 'fp32' ? data : toFloat16(data)];
    },
  }));
}

export interface ExportOptions {
  readonly precision: 'fp32' | 'fp16';
  readonly metadata: Readonly<Record<string, string>>;
}

/** All networks of a model in one file in the official layout, with tokenizers and the figures that shapes do not tell. */
export async function exportModel(
  model: TrainingModel,
  path: string,
  { precision, metadata }: ExportOptions,
): Promise<void> {
  const plans = partNames.flatMap((part) => exportedTensors(part, model.stored[part], precision));
  const configs = Object.fromEntries(partNames.map((part) => [part, model.stored[part]?.config]));
  const { clip, t5 } = model.tokenizers;
  await mkdir(dirname(path), { recursive: true });
  const complete = {
    format: 'pt',
    ...configMetadata(configs),
    ...(clip !== undefined && { [CLIP_TOKENIZER_KEY]: clip }),
    ...(t5 !== undefined && { [T5_TOKENIZER_KEY]: t5 }),
    ...metadata,
  };
  await writeFileAtomically(path, plannedSafetensorsChunks(plans, complete));
}
