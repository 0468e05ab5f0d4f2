/**
 * From files to the networks they hold. Parts are found by the names of their tensors, never by the files' names,
 * so that the official single file, an all-in-one file, ComfyUI's split files and diffusers' folders load through one
 * path.
 */
import { MmditxError } from '../errors.ts';
import type { ClipConfig, T5Config, TransformerConfig, VaeConfig } from '../models/config.ts';
import { CLIP_L } from '../models/config.ts';
import type { DType } from '../tensor/data.ts';
import { clipGConfig, clipLConfig, type PartShapes, t5Config, transformerConfig, vaeConfig } from './configs.ts';
import { clipTensors, type TensorShapes, t5Tensors, transformerTensors, vaeTensors } from './expected.ts';
import { foreignModelError, unknownModelError } from './foreign.ts';
import { fileWeights, type NetworkKind, officialNames } from './layouts.ts';
import { CLIP_TOKENIZER_KEY, type ConfigHints, readHints, T5_TOKENIZER_KEY } from './metadata.ts';
import { openWeightsFile } from './open.ts';
import { quote } from './quote.ts';
import type { ByteSource } from './safetensors.ts';
import { type Encoding, isBlockType, type Span, type WeightsFile, type WeightTensor } from './stored.ts';

export interface PartConfigs {
  readonly transformer: TransformerConfig;
  readonly vae: VaeConfig;
  readonly clipL: ClipConfig;
  readonly clipG: ClipConfig;
  readonly t5: T5Config;
}

export type PartName = keyof PartConfigs;

/** What messages call the parts, in the order in which people list them. */
export const partTitles: Readonly<Record<PartName, string>> = {
  transformer: 'transformer',
  vae: 'VAE',
  clipL: 'CLIP-L text encoder',
  clipG: 'CLIP-G text encoder',
  t5: 'T5 text encoder',
};

export const partNames = Object.keys(partTitles) as PartName[];

/** The weights of one network: all tensors it needs and no others, each of the shape its configuration asks for. */
export interface PartWeights<Config> {
  readonly config: Config;
  /** Name of the file it was found in; of several, all names. */
  readonly file: string;
  /** What its tensors' names begin with in that file. */
  readonly prefix: string;
  /** What the file says about itself. */
  readonly metadata: Readonly<Record<string, string>>;
  /** By the name without the prefix, as in `expected.ts`. */
  readonly tensors: ReadonlyMap<string, WeightTensor>;
}

export interface Checkpoint {
  /** The networks found. Which of them are needed is for the caller to say: Stable Diffusion 3 runs without T5, too. */
  readonly parts: { readonly [Part in PartName]?: PartWeights<PartConfigs[Part]> };
  /** Texts of tokenizer.json files that came with the weights; released models bring none. */
  readonly tokenizers: { readonly clip?: string; readonly t5?: string };
  readonly files: readonly WeightsFile[];
}

/**
 * Reads the headers of `sources` and assembles the networks in them. The sources must stay open as long as the
 * weights are used.
 * @throws MmditxError `bad-file`, `unsupported-model` for another model's files, `missing-part` when a network lacks
 *   tensors, `bad-option` when the files do not belong together.
 */
export async function openCheckpoint(sources: readonly ByteSource[]): Promise<Checkpoint> {
  const { files, parts } = await surveyFiles(sources);
  for (const part of parts) if (part.problem) throw part.problem;
  const complete = Object.fromEntries(
    parts.map(({ part, config, file, prefix, metadata, tensors }) => [
      part,
      { config, file, prefix, metadata, tensors },
    ]),
  ) as Checkpoint['parts'];
  const mismatch = findMismatch(complete);
  if (mismatch) throw mismatch;

  const metadataText = (key: string) => files.find(({ metadata }) => key in metadata)?.metadata[key];
  const clip = metadataText(CLIP_TOKENIZER_KEY);
  const t5 = metadataText(T5_TOKENIZER_KEY);
  return {
    parts: complete,
    tokenizers: { ...(clip !== undefined && { clip }), ...(t5 !== undefined && { t5 }) },
    files,
  };
}

/** A network found in a file, usable or not. */
export interface PartSurvey {
  readonly part: PartName;
  readonly file: string;
  readonly prefix: string;
  readonly metadata: Readonly<Record<string, string>>;
  /** Absent where too much is missing to tell. */
  readonly config?: PartConfigs[PartName];
  readonly tensors: ReadonlyMap<string, WeightTensor>;
  /** Names, without the prefix, of tensors the network needs and the file lacks. */
  readonly missing: readonly string[];
  /** Why the part cannot be used. */
  readonly problem?: MmditxError;
}

/** What files hold, faults included. At most one of each part, in the order of `partNames`. */
export interface Survey {
  readonly files: readonly WeightsFile[];
  readonly parts: readonly PartSurvey[];
  /** Weights in the files that no part uses. */
  readonly unused: number;
}

/**
 * Finds the networks in files and checks each by itself.
 * @throws MmditxError when a file is unreadable, is of another model, or repeats a part that another one holds.
 */
export async function surveyFiles(sources: readonly ByteSource[]): Promise<Survey> {
  const files: WeightsFile[] = [];
  const all: WeightTensor[] = [];
  const found: FoundPart[] = [];
  for (const source of sources) {
    const file = await openWeightsFile(source);
    const foreign = foreignModelError(source.name, file.tensors.keys());
    if (foreign) throw foreign;
    const weights = await fileWeights(file);
    const parts = findParts(file, weights);
    if (parts.length === 0) throw unknownModelError(source.name, weights.keys());
    files.push(file);
    all.push(...weights.values());
    found.push(...parts);
  }

  // Shards come first: a weight may be joined of tensors that lie in several.
  const whole = joinShards(found).map((part) => ({ ...part, tensors: officialNames(part.kind, part.tensors) }));
  const named = nameParts(whole);
  const parts: PartSurvey[] = [];
  for (const part of partNames) {
    const [first, second] = named.filter((candidate) => candidate.part === part);
    if (first && second) {
      const [a, b] = [first, second].map(({ file, prefix }) => file + (prefix && ` (${quote(prefix)})`));
      throw new MmditxError('bad-option', `Both ${a} and ${b} hold a ${partTitles[part]}; give only one of them.`);
    }
    if (first) parts.push(surveyPart(part, first));
  }
  return { files, parts, unused: countUnused(all, parts) };
}

function countUnused(weights: readonly WeightTensor[], parts: readonly PartSurvey[]): number {
  const key = ({ source, name }: Span) => `${source.name}\n${name}`;
  const used = new Set(parts.flatMap(({ tensors }) => [...tensors.values()].flatMap(({ spans }) => spans.map(key))));
  return weights.filter(({ spans }) => !spans.some((span) => used.has(key(span)))).length;
}

interface FoundPart {
  readonly kind: NetworkKind;
  readonly file: string;
  readonly prefix: string;
  readonly metadata: Readonly<Record<string, string>>;
  readonly hints: ConfigHints;
  /** The tensors whose names begin with the prefix, named without it. */
  readonly tensors: ReadonlyMap<string, WeightTensor>;
}

/** Names, official or diffusers', by which a network is found; the group is the prefix, empty or ending in a dot. */
const signatures: Readonly<Record<NetworkKind, RegExp>> = {
  transformer:
    /^(|.*?\.)(?:joint_blocks\.\d+\.(?:x|context)_block|transformer_blocks\.\d+\.(?:attn|norm1_context|ff_context))\./,
  vae: /^(|.*?\.)(?:encoder\.down|decoder\.up)(?:\.\d+\.block|_blocks\.\d+\.resnets)\.\d+\./,
  clip: /^(|.*?\.)text_model\.(?:embeddings|encoder)\./,
  t5: /^(|.*?\.)encoder\.block\.\d+\.layer\.\d+\./,
};

/** Networks of one kind that a file may hold: more than any model has of them. */
const MOST_NETWORKS = 16;

function findParts({ source, metadata }: WeightsFile, weights: ReadonlyMap<string, WeightTensor>): FoundPart[] {
  const hints = readHints(metadata, source.name);
  return (Object.keys(signatures) as NetworkKind[]).flatMap((kind) => {
    const prefixes = new Set<string>();
    for (const name of weights.keys()) {
      const prefix = signatures[kind].exec(name)?.[1];
      if (prefix !== undefined) prefixes.add(prefix);
    }
    if (prefixes.size > MOST_NETWORKS) {
      throw new MmditxError(
        'unsupported-model',
        `${source.name} holds ${prefixes.size} networks of one kind; give a checkpoint of one model.`,
      );
    }
    return [...prefixes].map((prefix) => ({
      kind,
      file: source.name,
      prefix,
      metadata,
      hints,
      tensors: tensorsUnder(weights, prefix),
    }));
  });
}

/** The tensors whose names begin with `prefix`, named without it. */
function tensorsUnder(weights: ReadonlyMap<string, WeightTensor>, prefix: string): Map<string, WeightTensor> {
  const tensors = new Map<string, WeightTensor>();
  for (const [name, weight] of weights) {
    if (name.startsWith(prefix)) tensors.set(name.slice(prefix.length), weight);
  }
  // T5 files hold their embedding table under one of two names, or under both.
  const embedding = tensors.get('encoder.embed_tokens.weight');
  if (embedding && !tensors.has('shared.weight')) tensors.set('shared.weight', embedding);
  return tensors;
}

/** A network that is spread over several files: parts of one kind and prefix that have no tensor in common. */
function joinShards(found: readonly FoundPart[]): FoundPart[] {
  const joined: FoundPart[] = [];
  for (const part of found) {
    const index = joined.findIndex(
      ({ kind, prefix, tensors }) =>
        kind === part.kind && prefix === part.prefix && ![...part.tensors.keys()].some((name) => tensors.has(name)),
    );
    const other = joined[index];
    if (!other) {
      joined.push(part);
      continue;
    }
    joined[index] = {
      ...other,
      file: `${other.file} and ${part.file}`,
      metadata: { ...part.metadata, ...other.metadata },
      hints: { ...part.hints, ...other.hints },
      tensors: new Map([...other.tensors, ...part.tensors]),
    };
  }
  return joined;
}

/**
 * Tells CLIP-L from CLIP-G: by the prefix of an all-in-one file, by the file's metadata, by width where there are
 * two, and a single one by the projection, which the released CLIP-G file has and the CLIP-L file has not.
 */
function nameParts(found: readonly FoundPart[]): (FoundPart & { readonly part: PartName })[] {
  const stated = (part: FoundPart): PartName | undefined => {
    if (part.kind !== 'clip') return part.kind;
    if (part.prefix.includes('clip_l')) return 'clipL';
    if (part.prefix.includes('clip_g')) return 'clipG';
    if (part.hints.clipL && !part.hints.clipG) return 'clipL';
    if (part.hints.clipG && !part.hints.clipL) return 'clipG';
    return undefined;
  };
  const width = ({ tensors }: FoundPart) => tensors.get('text_model.final_layer_norm.weight')?.shape[0] ?? 0;
  const unstated = found.filter((part) => stated(part) === undefined).sort((a, b) => width(a) - width(b));
  const byWidth = unstated.length === 2 && width(unstated[0]!) < width(unstated[1]!);
  const guessed = (part: FoundPart): PartName => {
    if (byWidth) return part === unstated[0] ? 'clipL' : 'clipG';
    const projected = part.tensors.has('text_projection.weight');
    return projected && width(part) !== CLIP_L.width ? 'clipG' : 'clipL';
  };
  return found.map((part) => ({ ...part, part: stated(part) ?? guessed(part) }));
}

type Networks = {
  readonly [Part in PartName]: {
    readonly derive: (part: PartShapes, hints: ConfigHints[Part]) => PartConfigs[Part];
    readonly tensors: (config: PartConfigs[Part]) => TensorShapes;
  };
};

const networks: Networks = {
  transformer: { derive: transformerConfig, tensors: transformerTensors },
  vae: { derive: vaeConfig, tensors: vaeTensors },
  clipL: { derive: clipLConfig, tensors: clipTensors },
  clipG: { derive: clipGConfig, tensors: clipTensors },
  t5: { derive: t5Config, tensors: t5Tensors },
};

/** Element types of trained weights; integers without scales would be a quantisation this version does not know. */
const weightTypes: ReadonlySet<Encoding> = new Set<DType>([
  'float64',
  'float32',
  'float16',
  'bfloat16',
  'float8e4m3',
  'float8e5m2',
]);

function surveyPart<Part extends PartName>(part: Part, found: FoundPart & { hints: ConfigHints }): PartSurvey {
  const { file: name, prefix, metadata, hints, tensors: available } = found;
  const shapes = new Map([...available].map(([tensor, { shape }]) => [tensor, shape]));
  let config: PartConfigs[Part];
  try {
    config = networks[part].derive({ file: name, shapes }, hints[part]);
  } catch (error) {
    if (!(error instanceof MmditxError)) throw error;
    return { part, file: name, prefix, metadata, tensors: available, missing: [], problem: error };
  }

  const tensors = new Map<string, WeightTensor>();
  const missing: string[] = [];
  let unfit: MmditxError | undefined;
  for (const [tensorName, shape] of networks[part].tensors(config)) {
    const tensor = available.get(tensorName);
    if (!tensor) {
      missing.push(tensorName);
      continue;
    }
    tensors.set(tensorName, tensor);
    if (tensor.shape.join() !== shape.join()) {
      unfit ??= new MmditxError(
        'bad-file',
        `Tensor ${quote(tensor.name)} of ${name} has the shape ${quote(tensor.shape)} where the ${partTitles[part]} needs ${quote(shape)}; use an unchanged checkpoint.`,
      );
    } else if (!tensor.quantized) {
      const unknown = tensor.spans.find(({ encoding }) => !weightTypes.has(encoding) && !isBlockType(encoding));
      unfit ??= unknown && unreadable(unknown.name, name, unknown.encoding);
    }
  }
  const problem = missing.length ? missingTensors(name, part, missing, tensors.size) : unfit;
  return { part, file: name, prefix, metadata, config, tensors, missing, ...(problem && { problem }) };
}

function unreadable(tensor: string, file: string, encoding: Encoding): MmditxError {
  return new MmditxError(
    'unsupported-model',
    `Tensor ${quote(tensor)} of ${file} holds ${encoding} values, a quantisation this version does not read; use a file in F32, F16, BF16 or F8, or a GGUF file.`,
  );
}

function missingTensors(file: string, part: PartName, missing: readonly string[], present: number): MmditxError {
  const shown = missing.slice(0, 3).join(', ') + (missing.length > 3 ? ` and ${missing.length - 3} more` : '');
  return new MmditxError(
    'missing-part',
    `${file} lacks ${missing.length} of the ${missing.length + present} tensors of the ${partTitles[part]} (${shown}); the file is incomplete, download it again.`,
  );
}

/** The error of parts of different models; undefined where they fit. */
export function findMismatch({ transformer, vae, clipL, clipG, t5 }: Checkpoint['parts']): MmditxError | undefined {
  const refuse = (a: { file: string }, found: string, b: { file: string }, needed: string) =>
    new MmditxError(
      'bad-option',
      `The parts are of different models: ${a.file} has ${found}, but ${b.file} has ${needed}; give files of one model.`,
    );
  if (!transformer) return undefined;
  const { contextWidth, pooledWidth, inChannels } = transformer.config;
  if (vae && vae.config.latentChannels !== inChannels) {
    const channels = `a transformer of ${inChannels} latent channels`;
    return refuse(vae, `a VAE of ${vae.config.latentChannels} latent channels`, transformer, channels);
  }
  if (t5 && t5.config.width !== contextWidth) {
    return refuse(t5, `a T5 ${t5.config.width} wide`, transformer, `a transformer for a context ${contextWidth} wide`);
  }
  const last = clipG ?? clipL;
  if (!last) return undefined;
  const pooled = (clipL?.config.pooledWidth ?? 0) + (clipG?.config.pooledWidth ?? 0);
  // With one encoder missing, zeros take its place.
  if (clipL && clipG ? pooled !== pooledWidth : pooled >= pooledWidth) {
    const vector = `a transformer for pooled vectors ${pooledWidth} wide`;
    return refuse(last, `a text encoder that makes pooled vectors ${pooled} wide`, transformer, vector);
  }
  const hidden = (clipL?.config.width ?? 0) + (clipG?.config.width ?? 0);
  if (hidden > contextWidth) {
    return refuse(
      last,
      `a CLIP context ${hidden} wide`,
      transformer,
      `a transformer for a context ${contextWidth} wide`,
    );
  }
  return undefined;
}
