/** What checkpoints are, for people: parts, configurations, sizes, number formats, and what is missing. */
import type { MmditxError } from '../errors.ts';
import {
  SD3_MEDIUM_TRANSFORMER,
  SD35_LARGE_TRANSFORMER,
  SD35_MEDIUM_TRANSFORMER,
  type TransformerConfig,
  vaeDownscale,
} from '../models/config.ts';
import { type DType, elementCount, type TypedArray } from '../tensor/data.ts';
import {
  type Checkpoint,
  findMismatch,
  type PartConfigs,
  type PartName,
  type PartSurvey,
  type PartWeights,
  partNames,
  partTitles,
  surveyFiles,
} from './checkpoint.ts';
import { CLIP_TOKENIZER_KEY, T5_TOKENIZER_KEY } from './metadata.ts';
import { quote } from './quote.ts';
import { type ByteSource, readExactly, viewAs } from './safetensors.ts';
import { decode, type Encoding, isBlockType, storedBytes, type WeightTensor } from './stored.ts';

export interface PartInspection {
  readonly part: PartName;
  readonly file: string;
  readonly prefix: string;
  /** Absent where too much is missing to tell. */
  readonly config?: PartConfigs[PartName];
  /** Values in the part's tensors. */
  readonly parameters: number;
  readonly tensors: number;
  readonly bytes: number;
  /** Tensors of each number format. */
  readonly encodings: Readonly<Record<string, number>>;
  /** Names of tensors the part needs and the file lacks. */
  readonly missing: readonly string[];
  /** Why the part cannot be used. */
  readonly problem?: string;
}

export interface CheckpointInspection {
  /** The released model whose transformer this is, or a description. */
  readonly model: string;
  readonly files: readonly { readonly name: string; readonly bytes: number; readonly tensors: number }[];
  readonly parts: readonly PartInspection[];
  /** Parts of a whole model that none of the files holds. */
  readonly missingParts: readonly PartName[];
  /** Tokenizers that come with the weights. */
  readonly tokenizers: readonly ('clip' | 't5')[];
  /** Tensors that no part uses. */
  readonly unusedTensors: number;
  /** Why the parts do not go together. */
  readonly mismatch?: string;
}

/**
 * Describes checkpoint files by their headers alone; faulty parts are described, too.
 * @throws MmditxError when a file cannot be read at all or is of another model.
 */
export async function inspectCheckpoint(sources: readonly ByteSource[]): Promise<CheckpointInspection> {
  const { files, parts, unused } = await surveyFiles(sources);
  const whole = parts.filter(({ problem }) => !problem);
  const mismatch: MmditxError | undefined = findMismatch(
    Object.fromEntries(whole.map((part) => [part.part, part])) as Checkpoint['parts'],
  );
  const tokenizers = [
    ['clip', CLIP_TOKENIZER_KEY],
    ['t5', T5_TOKENIZER_KEY],
  ] as const;
  return {
    model: modelTitle(parts),
    files: files.map(({ source, tensors }) => ({ name: source.name, bytes: source.size, tensors: tensors.size })),
    parts: parts.map(inspectPart),
    missingParts: partNames.filter((name) => !parts.some(({ part }) => part === name)),
    tokenizers: tokenizers.flatMap(([name, key]) => (files.some(({ metadata }) => key in metadata) ? [name] : [])),
    unusedTensors: unused,
    ...(mismatch && { mismatch: mismatch.message }),
  };
}

function inspectPart({ part, file, prefix, config, tensors, missing, problem }: PartSurvey): PartInspection {
  const encodings: Record<string, number> = {};
  let parameters = 0;
  let bytes = 0;
  for (const tensor of tensors.values()) {
    const encoding = tensor.quantized?.precision ?? tensor.spans[0]!.encoding;
    encodings[encoding] = (encodings[encoding] ?? 0) + 1;
    parameters += elementCount(tensor.shape);
    bytes += storedBytes(tensor);
  }
  return {
    part,
    file,
    prefix,
    ...(config && { config }),
    parameters,
    tensors: tensors.size,
    bytes,
    encodings,
    missing,
    ...(problem && { problem: problem.message }),
  };
}

/** Everything in files that a weight is made of. */
function spansOf({ spans, quantized }: WeightTensor) {
  return quantized ? [...spans, ...quantized.scales] : spans;
}

const releasedModels: readonly [string, TransformerConfig][] = [
  ['Stable Diffusion 3.5 Medium', SD35_MEDIUM_TRANSFORMER],
  ['Stable Diffusion 3.5 Large', SD35_LARGE_TRANSFORMER],
  ['Stable Diffusion 3 Medium', SD3_MEDIUM_TRANSFORMER],
];

function modelTitle(parts: readonly PartSurvey[]): string {
  const transformer = parts.find(({ part }) => part === 'transformer');
  if (!transformer) return 'parts of a Stable Diffusion 3 model, without a transformer';
  const config = transformer.config as TransformerConfig | undefined;
  if (!config) return 'a damaged Stable Diffusion 3 model';
  const keys = Object.keys(config) as (keyof TransformerConfig)[];
  const released = releasedModels.find(([, known]) => keys.every((key) => String(known[key]) === String(config[key])));
  return released?.[0] ?? 'a model of the Stable Diffusion 3 architecture, of its own size';
}

const integer = new Intl.NumberFormat('en-US');

function byteSize(bytes: number): string {
  const units = ['bytes', 'KiB', 'MiB', 'GiB', 'TiB'];
  const power = Math.min(Math.max(Math.floor(Math.log2(bytes || 1) / 10), 0), units.length - 1);
  return `${(bytes / 1024 ** power).toFixed(power ? 2 : 0)} ${units[power]}`;
}

const describeConfig: { readonly [Part in PartName]: (config: PartConfigs[Part]) => string } = {
  transformer: (c) =>
    [
      `${c.depth} blocks ${c.hiddenSize} wide, ${c.heads} heads of ${c.headDim}`,
      c.qkNorm ? 'QK norm' : 'no QK norm',
      c.dualAttentionLayers.length ? `dual attention in ${c.dualAttentionLayers.length} blocks` : 'no dual attention',
      `${c.inChannels} latent channels`,
      `pictures up to ${c.tableSize} x ${c.tableSize} patches of ${c.patchSize}`,
    ].join(', '),
  vae: (c) =>
    `${c.latentChannels} latent channels, ${vaeDownscale(c)} times smaller, ${c.multipliers.map((m) => m * c.channels).join('-')} channels`,
  clipL: describeClip,
  clipG: describeClip,
  t5: (c) => `${c.layers} layers ${c.width} wide, ${c.heads} heads of ${c.headDim}, vocabulary ${c.vocabSize}`,
};

function describeClip(c: PartConfigs['clipL']): string {
  return `${c.layers} layers ${c.width} wide, ${c.heads} heads, ${c.positions} tokens, vocabulary ${c.vocabSize}`;
}

/** The inspection as text of several lines, without a line break at the end. */
export function formatInspection(inspection: CheckpointInspection): string {
  const lines = [`Model: ${inspection.model}`];
  for (const { name, bytes, tensors } of inspection.files) {
    lines.push(`File: ${name} (${byteSize(bytes)}, ${integer.format(tensors)} tensors)`);
  }
  for (const part of inspection.parts) lines.push('', ...formatPart(part));
  lines.push('');
  const missing = inspection.missingParts.map((part) => partTitles[part]);
  lines.push(`Not in ${inspection.files.length > 1 ? 'these files' : 'this file'}: ${missing.join(', ') || 'nothing'}`);
  lines.push(`Tokenizers included: ${inspection.tokenizers.join(', ') || 'none'}`);
  if (inspection.unusedTensors) lines.push(`Tensors not used: ${integer.format(inspection.unusedTensors)}`);
  if (inspection.mismatch) lines.push(`Problem: ${inspection.mismatch}`);
  return lines.join('\n');
}

function formatPart({
  part,
  file,
  prefix,
  config,
  parameters,
  tensors,
  bytes,
  encodings,
  problem,
}: PartInspection): string[] {
  const title = partTitles[part];
  const formats = Object.entries(encodings).map(([encoding, count]) => `${encoding} (${count})`);
  const describe = describeConfig[part] as (config: PartConfigs[PartName]) => string;
  return [
    `${title[0]!.toUpperCase()}${title.slice(1)}: ${integer.format(parameters)} parameters in ${integer.format(tensors)} tensors, ${byteSize(bytes)}`,
    ...(config ? [`  ${describe(config)}`] : []),
    `  numbers: ${formats.join(', ')}`,
    `  from: ${file}${prefix && `, tensors ${quote(prefix)}`}`,
    ...(problem ? [`  problem: ${problem}`] : []),
  ];
}

/** Bits of a value's representation that are all ones where it is infinite or not a number. */
const exponentBits: Partial<Record<DType, number>> = {
  float16: 0x7c00,
  bfloat16: 0x7f80,
  // Without infinities: only the all-ones pattern is special.
  float8e4m3: 0x7f,
  float8e5m2: 0x7c,
};

function countNonFinite(encoding: Encoding, bytes: Uint8Array): number {
  if (isBlockType(encoding)) return countNonFiniteValues('float32', decode({ encoding }, bytes));
  return countNonFiniteValues(encoding, viewAs(encoding, bytes));
}

function countNonFiniteValues(dtype: DType, values: TypedArray): number {
  let count = 0;
  const mask = exponentBits[dtype];
  if (mask !== undefined) {
    for (const value of values) if ((Number(value) & mask) === mask) count++;
  } else if (dtype === 'float32' || dtype === 'float64') {
    for (const value of values) if (!Number.isFinite(value)) count++;
  }
  return count;
}

/** Read at once: a multiple of every element and block size. */
const CHUNK_BYTES = 9 * 5 * 7 * 11 * 17 * 64;

/**
 * The tensors of a part that hold infinities or NaN, and how many values of each. Reads the part once, a few MiB at a
 * time.
 */
export async function findNonFinite(
  part: Pick<PartWeights<unknown>, 'tensors'>,
  { signal }: { readonly signal?: AbortSignal } = {},
): Promise<{ name: string; count: number }[]> {
  const found: { name: string; count: number }[] = [];
  for (const weight of part.tensors.values()) {
    let count = 0;
    for (const { source, encoding, offset, byteLength } of spansOf(weight)) {
      for (let start = 0; start < byteLength; start += CHUNK_BYTES) {
        signal?.throwIfAborted();
        const bytes = await readExactly(source, offset + start, Math.min(CHUNK_BYTES, byteLength - start));
        count += countNonFinite(encoding, bytes);
      }
    }
    if (count) found.push({ name: weight.name, count });
  }
  return found;
}
