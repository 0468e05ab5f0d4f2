/** Writing files so that a reader finds the old file or the whole new one, never half of it. */
import { randomUUID } from 'node:crypto';
import { constants } from 'node:fs';
import { type FileHandle, open, realpath, rename, rm, stat } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { MmditxError } from '../errors.ts';

const reasons: Record<string, string> = {
  ENOSPC: 'the disk is full; free some space or choose another folder',
  EDQUOT: 'the disk quota is used up; free some space or choose another folder',
  EFBIG: 'the file system does not allow a file of that size; choose another folder',
  EACCES: 'permission is denied; change its permissions or choose another path',
  EPERM: 'the operation is not permitted; change its permissions or choose another path',
  EROFS: 'the file system is read-only; choose another folder',
  ENOENT: 'there is no such file or folder; check the path or create the folder first',
  ENOTDIR: 'a part of the path is a file, not a folder; check the path',
  EISDIR: 'it is a folder; give the path of a file',
  ENAMETOOLONG: 'the name is too long; choose a shorter one',
  EMFILE: 'too many files are open; close some or raise the limit',
  ETXTBSY: 'it is in use; choose another path',
  EBUSY: 'it is in use; close the program that uses it or choose another path',
};

/** The error of a failed file operation, with the operating system's error as its cause. */
export function ioError(action: 'read' | 'write', path: string, cause: unknown): MmditxError {
  const code = (cause as NodeJS.ErrnoException | undefined)?.code ?? '';
  const reason = reasons[code] ?? (cause instanceof Error ? cause.message : String(cause));
  return new MmditxError('io', `Cannot ${action} ${path}: ${reason}.`, { cause });
}

export interface WriteOptions {
  /** Stops between two chunks; nothing is left behind. */
  readonly signal?: AbortSignal;
}

/**
 * Writes `chunks` to a temporary file beside `path`, flushes it to the disk and renames it to `path`.
 * On failure the temporary file is removed and an existing file at `path` stays as it was. A symbolic link is
 * followed; a device or a pipe is written to directly.
 * @throws MmditxError `io` when the file system refuses; whatever `chunks` throws; the signal's reason.
 */
export async function writeFileAtomically(
  path: string,
  chunks: Iterable<Uint8Array> | AsyncIterable<Uint8Array>,
  { signal }: WriteOptions = {},
): Promise<void> {
  const attempt = <T>(operation: Promise<T>): Promise<T> =>
    operation.catch((cause) => {
      throw ioError('write', path, cause);
    });

  const existing = await stat(path).catch(() => undefined);
  if (existing?.isDirectory()) throw ioError('write', path, { code: 'EISDIR' });
  const direct = existing !== undefined && !existing.isFile();
  const target = existing ? await attempt(realpath(path)) : path;
  const written = direct ? target : join(dirname(target), `.${basename(target).slice(0, 100)}.${randomUUID()}.tmp`);
  const flags = direct ? constants.O_WRONLY : constants.O_WRONLY | constants.O_CREAT | constants.O_EXCL;
  const handle = await attempt(open(written, flags, existing ? existing.mode & 0o777 : 0o666));
  try {
    try {
      for await (const chunk of chunks) {
        signal?.throwIfAborted();
        await attempt(writeFully(handle, chunk));
      }
      if (!direct) await attempt(handle.sync());
    } finally {
      await attempt(handle.close());
    }
    if (!direct) await attempt(rename(written, target));
  } catch (error) {
    if (!direct) await rm(written, { force: true }).catch(() => undefined);
    throw error;
  }
}

/** One system call may write less than it was given. */
async function writeFully(handle: FileHandle, bytes: Uint8Array): Promise<void> {
  for (let written = 0; written < bytes.length; ) {
    written += (await handle.write(bytes, written, bytes.length - written)).bytesWritten;
  }
}
