/** Which files of a folder make up a model: diffusers' folders, ComfyUI's split files, snapshots of the hub's cache. */
import { opendir, readFile, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { z } from 'zod';
import { MmditxError } from '../errors.ts';
import { ioError } from './atomic.node.ts';
import { pickleError } from './foreign.ts';
import { quote } from './quote.ts';

/** In these, diffusers keeps a network each. */
const DIFFUSERS_FOLDERS = ['transformer', 'vae', 'text_encoder', 'text_encoder_2', 'text_encoder_3'];
const DIFFUSERS_MARK = 'model_index.json';
/** In these lie a model's files elsewhere; the first is the model's folder itself. */
const SPLIT_FOLDERS = ['', 'diffusion_models', 'text_encoders', 'vae'];

/** More than any model has; a folder of other things is not read through. */
const MAX_NAMES = 10_000;
const MAX_FILES = 256;
/** The index of T5 XXL is 20 kB long. */
const MAX_INDEX_BYTES = 2 ** 24;

export interface ModelFilesOptions {
  /** Gets a sentence about each choice between copies of the same weights. */
  readonly onNote?: (text: string) => void;
}

/**
 * The files of the model at a path: a file is its own answer. Of copies of the same weights in several number formats
 * the plain one is taken, else the one in fp16.
 * @throws MmditxError `io` when the path cannot be read; `missing-part` when the folder holds no weights or lacks some
 *   of what its index names; `bad-file` for a damaged index; `bad-option` when it does not say which files are meant;
 *   `unsupported-model` when all it has are pickles
 */
export async function modelFiles(path: string, { onNote }: ModelFilesOptions = {}): Promise<string[]> {
  const status = await stat(path).catch((cause) => {
    throw ioError('read', path, cause);
  });
  if (!status.isDirectory()) return [path];

  const listings = new Map<string, Listing>();
  for (const name of new Set([...SPLIT_FOLDERS, ...DIFFUSERS_FOLDERS])) {
    listings.set(name, await readListing(name ? join(path, name) : path));
  }
  const listed = (names: readonly string[]) => names.map((name) => listings.get(name)!);
  const holds = (...names: string[]) => listed(names).some(({ copies }) => copies.length > 0);
  // A repository may have its model in both layouts.
  const marked = listings.get('')!.names.has(DIFFUSERS_MARK);
  const split = holds('', 'diffusion_models', 'text_encoders') && !(marked && holds('transformer'));

  const files: string[] = [];
  for (const listing of listed(split ? SPLIT_FOLDERS : DIFFUSERS_FOLDERS)) {
    const chosen = chooseCopies(listing, onNote);
    if (!split && chosen.length > 1) throw ambiguous(listing.folder, chosen);
    const pickle = pickleIn(listing);
    if (!split && chosen.length === 0 && pickle) throw pickleError(pickle);
    files.push(...chosen.flatMap((copy) => presentFiles(listing, copy)));
  }
  if (files.length > MAX_FILES) {
    throw new MmditxError('bad-option', `${path} holds ${files.length} files of weights; give the files of one model.`);
  }
  if (files.length > 0) return files;
  const pickle = [...listings.values()].map(pickleIn).find((name) => name !== undefined);
  if (pickle) throw pickleError(pickle);
  throw new MmditxError(
    'missing-part',
    `${path} holds no weights; give a .safetensors or .gguf file, or a folder with the files of a model.`,
  );
}

/** Weights in one number format: a file, or the shards that an index names. */
interface Copy {
  /** Equal for copies of the same weights. */
  readonly base: string;
  /** What the name says of the numbers, such as `fp16`; empty for the plain copy. */
  readonly format: string;
  readonly files: readonly string[];
  /** The name of the index that names the files. */
  readonly index?: string;
}

interface Listing {
  readonly folder: string;
  readonly names: ReadonlySet<string>;
  readonly copies: readonly Copy[];
}

/** What lies in a folder; nothing where there is none. */
async function readListing(folder: string): Promise<Listing> {
  const names = await readNames(folder);
  const indexed: Copy[] = [];
  for (const name of names) {
    // diffusers and Transformers put the variant of shards behind the ending, others before it.
    const [, stem, variant] = /^(.+)\.safetensors\.index(?:\.([\w-]+))?\.json$/.exec(name) ?? [];
    if (stem === undefined) continue;
    const files = await readIndex(join(folder, name));
    indexed.push({ ...copyNamed(variant === undefined ? stem : `${stem}.${variant}`), files, index: name });
  }
  const shards = new Set(indexed.flatMap(({ files }) => files));
  const single = names.flatMap((name): Copy[] => {
    const [, stem, ending] = /^(.+)\.(safetensors|gguf)$/i.exec(name) ?? [];
    if (stem === undefined || shards.has(name)) return [];
    return [{ ...(ending!.toLowerCase() === 'gguf' ? { base: name, format: '' } : copyNamed(stem)), files: [name] }];
  });
  return { folder, names: new Set(names), copies: [...indexed, ...single] };
}

/** The names of the files in a folder, links to files included. */
async function readNames(folder: string): Promise<string[]> {
  const names: string[] = [];
  try {
    for await (const entry of await opendir(folder)) {
      if (!entry.isDirectory()) names.push(entry.name);
      if (names.length > MAX_NAMES) break;
    }
  } catch (cause) {
    const { code } = cause as NodeJS.ErrnoException;
    if (code === 'ENOENT' || code === 'ENOTDIR') return [];
    throw ioError('read', folder, cause);
  }
  if (names.length > MAX_NAMES) {
    throw new MmditxError('bad-option', `${folder} holds more than ${MAX_NAMES} files; give those of the model.`);
  }
  return names.sort();
}

const indexSchema = z.object({ weight_map: z.record(z.string(), z.string()) });
/** A file beside the index. */
const SHARD_NAME = /^[^/\\:\p{Cc}]+\.safetensors$/u;

/** The names of the shards in an index as diffusers and Transformers write it. */
async function readIndex(path: string): Promise<string[]> {
  const refuse = (found: string) =>
    new MmditxError('bad-file', `${path} is not a usable index of shards: ${found}; download it again.`);
  let text: string;
  try {
    const status = await stat(path);
    if (!status.isFile() || status.size > MAX_INDEX_BYTES) throw refuse(`it has ${status.size} bytes`);
    text = await readFile(path, 'utf8');
  } catch (cause) {
    throw cause instanceof MmditxError ? cause : ioError('read', path, cause);
  }
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    throw refuse('it is not JSON');
  }
  const index = indexSchema.safeParse(value);
  if (!index.success) throw refuse('it has no list "weight_map" of files');
  const shards = [...new Set(Object.values(index.data.weight_map))].sort();
  const odd = shards.find((name) => !SHARD_NAME.test(name));
  if (odd !== undefined) throw refuse(`${quote(odd)} is no .safetensors file beside it`);
  if (shards.length === 0 || shards.length > MAX_FILES) throw refuse(`it names ${shards.length} files`);
  return shards;
}

/** Endings of names that tell the copies of one file apart, the best first: ComfyUI's, diffusers' variants. */
const FORMATS = [/^$/, /^fp16$/, /^bf16$/, /^fp32$/, /^fp8.*scaled$/, /^fp8/, /ema$/];

function copyNamed(stem: string): Pick<Copy, 'base' | 'format'> {
  const ending = /^(.+)[._-](fp16|bf16|fp32|fp8(?:_e[45]m[23](?:fn)?)?(?:_scaled)?|(?:non_)?ema)$/i.exec(stem);
  return ending ? { base: ending[1]!, format: ending[2]!.toLowerCase() } : { base: stem, format: '' };
}

/** The best of the copies of each file. */
function chooseCopies({ folder, copies }: Listing, onNote: ModelFilesOptions['onNote']): Copy[] {
  const rank = ({ format }: Copy) => FORMATS.findIndex((pattern) => pattern.test(format));
  const best = new Map<string, Copy>();
  const repeated = new Set<Copy>();
  for (const copy of copies.toSorted((a, b) => rank(a) - rank(b))) {
    const better = best.get(copy.base);
    if (better) repeated.add(better);
    else best.set(copy.base, copy);
  }
  for (const copy of repeated) {
    onNote?.(
      `${folder} holds ${quote(copy.base)} several times; ${titleOf(copy)} is used (give the files themselves to choose another).`,
    );
  }
  return [...best.values()];
}

function titleOf({ files, index }: Copy): string {
  return quote(index ?? files[0]!);
}

function presentFiles({ folder, names }: Listing, { files, index }: Copy): string[] {
  const missing = files.find((name) => !names.has(name));
  if (missing !== undefined) {
    throw new MmditxError(
      'missing-part',
      `${join(folder, index!)} names ${quote(missing)}, which is not there; download it, too.`,
    );
  }
  return files.map((name) => join(folder, name));
}

function pickleIn({ folder, names }: Listing): string | undefined {
  const name = [...names].find((file) => /\.(ckpt|pt|pth|bin)$/i.test(file));
  return name === undefined ? undefined : join(folder, name);
}

function ambiguous(folder: string, copies: readonly Copy[]): MmditxError {
  const names = copies.slice(0, 3).map(titleOf).join(', ');
  return new MmditxError(
    'bad-option',
    `${folder} holds several files of weights (${names}${copies.length > 3 ? ' and more' : ''}) and no index of them; keep one there, or give the files themselves.`,
  );
}
