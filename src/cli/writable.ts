/** Finding out before hours of work whether its result can be written. */
import { randomUUID } from 'node:crypto';
import { mkdir, open, rm, stat, statfs } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { MmditxError } from '../errors.ts';
import { ioError } from '../weights/atomic.node.ts';
import { formatBytes } from '../weights/download.node.ts';

/**
 * Tries to make a file in the folder of `path` and removes it again; permissions alone tell too little (read-only file
 * systems, folders that only look like some). A device or a pipe is opened instead, as it will be when it is written.
 * @throws MmditxError `io`
 */
export async function requireWritable(path: string): Promise<void> {
  const existing = await stat(path).catch(() => undefined);
  const special = existing !== undefined && !existing.isFile();
  const trial = special ? path : join(dirname(path), `.${randomUUID()}.tmp`);
  try {
    const handle = await open(trial, special ? 'r+' : 'wx');
    await handle.close();
    if (!special) await rm(trial);
  } catch (cause) {
    throw ioError('write', path, cause);
  }
}

/**
 * Makes the folder that `path` is to lie in, with those above it. Node's own way of doing that (`recursive`) never ends
 * on file systems such as /proc, which say that a folder to be made does not exist (Node 20).
 * @throws MmditxError `io`
 */
export async function makeFolderOf(path: string): Promise<void> {
  await makeFolder(dirname(path)).catch((cause) => {
    throw ioError('write', path, cause);
  });
}

async function makeFolder(folder: string): Promise<void> {
  const exists = await stat(folder).then(
    () => true,
    () => false,
  );
  if (exists) return;
  const parent = dirname(folder);
  if (parent !== folder) await makeFolder(parent);
  await mkdir(folder).catch((error: NodeJS.ErrnoException) => {
    // Another program was faster.
    if (error.code !== 'EEXIST') throw error;
  });
}

/**
 * Checks that there is room for a file of some size.
 * @throws MmditxError `io`
 */
export async function requireRoom(path: string, bytes: number): Promise<void> {
  const { bavail, bsize } = await statfs(dirname(path));
  if (bytes <= bavail * bsize) return;
  throw new MmditxError(
    'io',
    `${path} will have ${formatBytes(bytes)} and only ${formatBytes(bavail * bsize)} is free there; free some space or choose another folder.`,
  );
}
