/** Models from the Hugging Face hub, into the cache that all its tools share. */
import { join } from 'node:path';
import { MmditxError } from '../errors.ts';
import { fetchBlob, partialBytes } from './hub-blob.node.ts';
import {
  type CachedRepo,
  cachedCommit,
  cachedRepo,
  freeBytes,
  type HubFile,
  isComplete,
  isInside,
  linkBlob,
  makeFolder,
  requireRepoName,
  snapshotFiles,
  writeRef,
} from './hub-cache.node.ts';
import { type HubLicence, hubRepo, requireInside } from './hub-repo.node.ts';
import type { Hub, RetryOptions } from './hub-requests.node.ts';
import { type Environment, type HubOptions, type HubSettings, hubSettings } from './hub-settings.node.ts';
import { quote } from './quote.ts';

export type { HubLicence } from './hub-repo.node.ts';

/** Which of the T5 files: 9.8 GB, 4.9 GB, or none, with which pictures follow the prompt less closely. */
export const T5_FORMATS = ['fp16', 'fp8', 'none'] as const;
export type T5Format = (typeof T5_FORMATS)[number];

export const DEFAULT_REPO = 'stabilityai/stable-diffusion-3.5-medium';

export interface DownloadOptions extends HubOptions {
  /** Name of the model on the hub (default {@link DEFAULT_REPO}). */
  readonly repo?: string;
  /** A branch, a tag or a commit (default `main`). */
  readonly revision?: string;
  /** The T5 text encoder (default `fp16`). */
  readonly t5?: T5Format;
  /**
   * Patterns of other files to take instead: `*` and `?` stand for characters within a folder, `**` for folders, too.
   * Default: what this package needs of Stable Diffusion 3.5 Medium to draw.
   */
  readonly include?: readonly string[];
  /** Called once before anything is fetched or written; what it throws stops the download. */
  readonly confirm?: (plan: DownloadPlan) => void | Promise<void>;
  readonly onProgress?: (progress: DownloadProgress) => void;
  /** Gets sentences about waits and repetitions. */
  readonly onNote?: (text: string) => void;
  readonly signal?: AbortSignal;
  readonly retries?: RetryOptions;
  /** Where variables such as `HF_HOME` are looked up (default the process's). */
  readonly environment?: Environment;
}

export interface DownloadPlan {
  readonly repo: string;
  readonly commit: string;
  readonly licence: HubLicence;
  readonly files: readonly { readonly name: string; readonly size: number; readonly cached: boolean }[];
  /** Still to be fetched. */
  readonly bytes: number;
  readonly cache: string;
}

export interface DownloadProgress {
  /** Name in the repository. */
  readonly file: string;
  /** Bytes of all files that were not in the cache, those of an earlier run included. */
  readonly done: number;
  readonly total: number;
  /** Bytes that have arrived since the call. */
  readonly fetched: number;
}

export interface DownloadedFile {
  /** In the repository, with `/` between folders. */
  readonly name: string;
  /** Where it is. */
  readonly path: string;
  /** In bytes. */
  readonly size: number;
}

export interface Download {
  /** Holds the files under their names in the repository. */
  readonly folder: string;
  readonly files: readonly DownloadedFile[];
}

/**
 * Downloads files of a model; those in the cache are not fetched again, and one that broke off is fetched from there
 * on. A file gets its name when its size and hash are those the hub tells.
 * @throws MmditxError `io` when the hub cannot be reached, refuses, or the disk is full; `missing-part` when the
 *   repository (offline: the cache) lacks a file; `bad-file` when a file arrives damaged again and again;
 *   `bad-option`; the signal's reason; what `confirm` throws
 */
export async function downloadModel(options: DownloadOptions = {}): Promise<Download> {
  const { repo = DEFAULT_REPO, revision = 'main', environment = process.env, signal, onNote } = options;
  requireRepoName(repo);
  if (!isInside(revision)) {
    throw new MmditxError('bad-option', `${quote(revision)} is no revision; give a branch, a tag or a commit.`);
  }
  const settings = await hubSettings(options, environment);
  const cached = cachedRepo(settings.cache, repo);
  const wanted = wantedFiles(options);
  if (settings.offline) return await fromCache(cached, settings, { repo, revision, wanted });

  const hub: Hub = { ...settings, ...options.retries, signal, onNote };
  const { commit, licence, files: listed } = await hubRepo(hub, repo, revision);
  const { chosen, missing } = chooseFiles(listed, wanted);
  if (missing.length > 0) {
    throw new MmditxError(
      'missing-part',
      `${repo} has no ${sentenceList(missing)}; choose files of it with --include, or another model.`,
    );
  }
  for (const file of chosen) requireInside(file, repo);

  const folder = cached.snapshot(commit);
  const files = chosen.map(({ name, size }) => ({ name, path: join(folder, ...name.split('/')), size }));
  const missingFiles: HubFile[] = [];
  for (const [index, file] of chosen.entries()) {
    if (!(await isComplete(files[index]!.path, file.size))) missingFiles.push(file);
  }
  const blobs = await missingBlobs(cached, missingFiles);
  const bytes = sum(blobs.map(({ size, partial }) => size - partial));
  await options.confirm?.({
    repo,
    commit,
    licence,
    files: chosen.map((file) => ({
      name: file.name,
      size: file.size,
      cached: !blobs.some(({ hash }) => hash === file.hash),
    })),
    bytes,
    cache: settings.cache,
  });

  await makeFolder(cached.blobs);
  await requireSpace(cached.blobs, bytes);
  const total = sum(blobs.map(({ size }) => size));
  let before = 0;
  let fetched = 0;
  for (const blob of blobs) {
    signal?.throwIfAborted();
    let last: number | undefined;
    await fetchBlob(hub, blob, join(cached.blobs, blob.hash), {
      url: `${settings.endpoint}/${repo}/resolve/${commit}/${blob.name.split('/').map(encodeURIComponent).join('/')}`,
      subject: { repo, revision, file: blob.name },
      onPosition: (position) => {
        // The first position is what an earlier run has left; it falls when a damaged file is fetched once more.
        fetched += Math.max(position - (last ?? position), 0);
        last = position;
        options.onProgress?.({ file: blob.name, done: before + position, total, fetched });
      },
    });
    before += blob.size;
  }
  for (const { name, hash } of missingFiles) {
    await linkBlob(join(cached.blobs, hash), join(folder, ...name.split('/')));
  }
  await writeRef(cached, revision, commit);
  return { folder, files };
}

/** Names or patterns, with alternatives: of the first list in a group that is there completely, all files are taken. */
type Wanted = readonly (readonly (readonly string[])[])[];

/** What the package draws with: the layout of stabilityai/stable-diffusion-3.5-medium. */
function wantedFiles({ include, t5 = 'fp16' }: DownloadOptions): Wanted {
  if (include !== undefined) {
    if (include.length === 0) throw new MmditxError('bad-option', 'include has no patterns; give at least one.');
    return include.map((pattern) => [[pattern]]);
  }
  const t5Files: Record<T5Format, Wanted> = {
    fp16: [[['text_encoders/t5xxl_fp16.safetensors']], [['tokenizer_3/tokenizer.json']]],
    fp8: [[['text_encoders/t5xxl_fp8_e4m3fn.safetensors']], [['tokenizer_3/tokenizer.json']]],
    none: [],
  };
  if (!Object.hasOwn(t5Files, t5)) {
    throw new MmditxError('bad-option', `There is no T5 format ${quote(t5)}; choose one of ${T5_FORMATS.join(', ')}.`);
  }
  return [
    [['sd3.5_medium.safetensors']],
    [['text_encoders/clip_l.safetensors']],
    [['text_encoders/clip_g.safetensors']],
    // CLIP-L's and CLIP-G's are the same but for the padding.
    [['tokenizer/tokenizer.json'], ['tokenizer/vocab.json', 'tokenizer/merges.txt']],
    ...t5Files[t5],
  ];
}

/** Files that are wanted, each once, and names and patterns that nothing matches. */
function chooseFiles<File extends { readonly name: string }>(
  files: readonly File[],
  wanted: Wanted,
): { chosen: File[]; missing: string[] } {
  const matching = (glob: string) => {
    const pattern = globPattern(glob);
    return files.filter(({ name }) => pattern.test(name));
  };
  const chosen = new Set<File>();
  const missing: string[] = [];
  for (const alternatives of wanted) {
    const found = alternatives.find((patterns) => patterns.every((pattern) => matching(pattern).length > 0));
    if (found) for (const file of found.flatMap(matching)) chosen.add(file);
    // The last alternative is what the hub has.
    else missing.push(...alternatives.at(-1)!.filter((pattern) => matching(pattern).length === 0));
  }
  return { chosen: [...chosen], missing };
}

/** `*` and `?` within a folder, `**` across folders; a folder's name with `/` at its end stands for all in it. */
function globPattern(glob: string): RegExp {
  const source = glob
    .replace(/\/$/, '/**')
    .split(/(\*\*\/|\*\*|\*|\?)/)
    .map((piece) => GLOB_PIECES[piece] ?? piece.replace(/[\\^$.*+?()[\]{}|]/g, '\\$&'))
    .join('');
  return new RegExp(`^${source}$`, 's');
}

const GLOB_PIECES: Readonly<Record<string, string>> = { '**/': '(?:.*/)?', '**': '.*', '*': '[^/]*', '?': '[^/]' };

async function fromCache(
  cached: CachedRepo,
  { cache }: HubSettings,
  { repo, revision, wanted }: { repo: string; revision: string; wanted: Wanted },
): Promise<Download> {
  const commit = await cachedCommit(cached, revision);
  const folder = commit === undefined ? undefined : cached.snapshot(commit);
  const present = folder === undefined ? [] : await snapshotFiles(folder);
  const { chosen, missing } = chooseFiles(present, wanted);
  if (folder === undefined || missing.length > 0) {
    throw new MmditxError(
      'missing-part',
      `The cache ${cache} has no ${sentenceList(missing)} of ${repo} (revision ${revision}); run it once without --offline and HF_HUB_OFFLINE.`,
    );
  }
  return { folder, files: chosen.map(({ name, size }) => ({ name, path: join(folder, ...name.split('/')), size })) };
}

/** Contents that are not in the cache, each once, with how much an earlier run has left of them. */
async function missingBlobs(cached: CachedRepo, files: readonly HubFile[]): Promise<(HubFile & { partial: number })[]> {
  const blobs = new Map<string, HubFile & { partial: number }>();
  for (const file of files) {
    const path = join(cached.blobs, file.hash);
    if (blobs.has(file.hash) || (await isComplete(path, file.size))) continue;
    blobs.set(file.hash, { ...file, partial: await partialBytes(path, file) });
  }
  return [...blobs.values()];
}

/** @throws MmditxError `io` when a disk has less space than is needed */
async function requireSpace(folder: string, bytes: number): Promise<void> {
  const free = await freeBytes(folder);
  if (free === undefined || bytes <= free) return;
  throw new MmditxError(
    'io',
    `The download needs ${formatBytes(bytes)}, but there are ${formatBytes(free)} free at ${folder}; free some space or choose another folder with --cache.`,
  );
}

/** Such as 9.8 GB: decimal units, as disks and the hub count. */
export function formatBytes(bytes: number): string {
  const units = ['bytes', 'kB', 'MB', 'GB', 'TB'];
  const exponent = Math.min(Math.floor(Math.log10(Math.max(bytes, 1)) / 3), units.length - 1);
  return `${exponent === 0 ? bytes : (bytes / 1000 ** exponent).toFixed(1)} ${units[exponent]}`;
}

function sum(values: readonly number[]): number {
  return values.reduce((total, value) => total + value, 0);
}

/** Such as "a, b and c", the names quoted. */
function sentenceList(names: readonly string[]): string {
  const quoted = names.map((name) => quote(name));
  const last = quoted.pop() ?? '';
  return quoted.length > 0 ? `${quoted.join(', ')} and ${last}` : last;
}
