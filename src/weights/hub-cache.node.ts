/**
 * The cache on disk that Hugging Face's tools share (https://huggingface.co/docs/hub/local-cache): contents lie in
 * `blobs/` by their hash, `snapshots/COMMIT/` has the repository's names as links to them, and `refs/` tells the commit
 * of a branch or tag.
 */
import { randomUUID } from 'node:crypto';
import { copyFile, link, mkdir, readdir, readFile, rename, rm, stat, statfs, symlink } from 'node:fs/promises';
import { dirname, join, relative, sep } from 'node:path';
import { MmditxError } from '../errors.ts';
import { ioError, writeFileAtomically } from './atomic.node.ts';
import { quote } from './quote.ts';

/** A file of a repository, as its listing has it. */
export interface HubFile {
  /** With `/` between folders. */
  readonly name: string;
  /** In bytes. */
  readonly size: number;
  /** SHA-256 of the content (64 digits: large files) or git's SHA-1 (40 digits: the others). */
  readonly hash: string;
}

export interface CachedRepo {
  readonly blobs: string;
  /** Of one commit. */
  snapshot(commit: string): string;
  /** The file that holds the commit of a branch or tag. */
  ref(revision: string): string;
}

export const COMMIT = /^[0-9a-f]{40}$/;

/** Longer names fit no file system. */
const MAX_NAME_LENGTH = 1024;

/** @param repo a name that {@link requireRepoName} has passed */
export function cachedRepo(cache: string, repo: string): CachedRepo {
  const folder = join(cache, `models--${repo.replaceAll('/', '--')}`);
  return {
    blobs: join(folder, 'blobs'),
    snapshot: (commit) => join(folder, 'snapshots', commit),
    ref: (revision) => join(folder, 'refs', ...revision.split('/')),
  };
}

/**
 * The hub's rule for names, which also keeps them inside the cache.
 * @throws MmditxError `bad-option`
 */
export function requireRepoName(repo: string): void {
  const part = /^(?!.*(--|\.\.))[A-Za-z0-9_.-]{1,96}$/;
  const parts = repo.split('/');
  if (parts.length <= 2 && parts.every((name) => part.test(name) && name !== '.')) return;
  throw new MmditxError(
    'bad-option',
    `${quote(repo)} is no name of a model; give one such as stabilityai/stable-diffusion-3.5-medium.`,
  );
}

/**
 * Whether a name from outside stays inside the folder it is joined to, on every system: no way up, no root, no drive.
 */
export function isInside(name: string): boolean {
  return (
    name.length <= MAX_NAME_LENGTH &&
    !/[\\:\p{Cc}]/u.test(name) &&
    name.split('/').every((part) => part !== '' && part !== '.' && part !== '..')
  );
}

/** The commit that a revision had when it was last downloaded. */
export async function cachedCommit(repo: CachedRepo, revision: string): Promise<string | undefined> {
  if (COMMIT.test(revision)) return revision;
  const text = await readFile(repo.ref(revision), 'utf8').catch(() => '');
  return COMMIT.test(text.trim()) ? text.trim() : undefined;
}

export async function writeRef(repo: CachedRepo, revision: string, commit: string): Promise<void> {
  if (COMMIT.test(revision)) return;
  const path = repo.ref(revision);
  await makeFolder(dirname(path));
  await writeFileAtomically(path, [new TextEncoder().encode(commit)]);
}

/** Names of the files that a snapshot has, with their sizes; links to contents that are gone are left out. */
export async function snapshotFiles(snapshot: string): Promise<{ name: string; size: number }[]> {
  const names = await readdir(snapshot, { recursive: true }).catch(() => []);
  const files: { name: string; size: number }[] = [];
  for (const name of names.sort()) {
    const status = await stat(join(snapshot, name)).catch(() => undefined);
    if (status?.isFile()) files.push({ name: name.split(sep).join('/'), size: status.size });
  }
  return files;
}

/** Whether there is a file of this size; its name was given when its content had been verified. */
export async function isComplete(path: string, size: number): Promise<boolean> {
  const status = await stat(path).catch(() => undefined);
  return status?.isFile() === true && status.size === size;
}

/** Bytes that can be written where `folder` is; undefined where the file system does not tell. */
export async function freeBytes(folder: string): Promise<number | undefined> {
  const status = await statfs(folder).catch(() => undefined);
  return status && status.blocks > 0 ? status.bavail * status.bsize : undefined;
}

/**
 * Makes a folder with those above it. Node's own way (`recursive`) never ends on file systems such as /proc, which say
 * that a folder to be made does not exist (Node 20).
 * @throws MmditxError `io`
 */
export async function makeFolder(folder: string): Promise<void> {
  if ((await stat(folder).catch(() => undefined))?.isDirectory()) return;
  const parent = dirname(folder);
  if (parent !== folder) await makeFolder(parent);
  await mkdir(folder).catch((cause: NodeJS.ErrnoException) => {
    // Another program was faster.
    if (cause.code !== 'EEXIST') throw ioError('write', folder, cause);
  });
}

/**
 * Gives a content its name in a snapshot, in place of whatever has the name: a relative link, so that the cache can be
 * moved; a hard link or a copy where there are no links (Windows without developer mode).
 * @throws MmditxError `io`
 */
export async function linkBlob(blob: string, path: string): Promise<void> {
  await makeFolder(dirname(path));
  const temporary = join(dirname(path), `.${randomUUID()}.tmp`);
  try {
    await symlink(relative(dirname(path), blob), temporary)
      .catch(() => link(blob, temporary))
      .catch(() => copyFile(blob, temporary));
    await rename(temporary, path);
  } catch (cause) {
    await rm(temporary, { force: true }).catch(() => undefined);
    throw ioError('write', path, cause);
  }
}
