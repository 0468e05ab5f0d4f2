/** Fetching one file of a hub: resumed where it broke off, and given its name only when its content is the right one. */
import { createHash, type Hash } from 'node:crypto';
import { constants } from 'node:fs';
import { type FileHandle, open, rename, rm, stat } from 'node:fs/promises';
import { MmditxError } from '../errors.ts';
import { ioError } from './atomic.node.ts';
import { type HubFile, isComplete } from './hub-cache.node.ts';
import { ask, broken, type Hub, PassingFailure, persist, type Subject } from './hub-requests.node.ts';
import { quote } from './quote.ts';

export interface BlobOptions {
  /** Where the file's content comes from. */
  readonly url: string;
  readonly subject: Subject;
  /** Gets how many bytes of the file there are. */
  readonly onPosition?: (bytes: number) => void;
}

/** How often a file is fetched from its beginning because its content was not the right one. */
const DOWNLOADS = 2;
/** Bytes read at once of what an earlier run has left. */
const READ_BYTES = 2 ** 22;

/**
 * Where a file grows. Not the name that other tools use (`.incomplete`): they append, and two programs would mix their
 * bytes. Two runs of this package may share it, because each writes the same bytes to the same places.
 */
export function partialPath(path: string): string {
  return `${path}.mmditx.incomplete`;
}

/** How much of a file there is already. */
export async function partialBytes(path: string, { size }: HubFile): Promise<number> {
  const status = await stat(partialPath(path)).catch(() => undefined);
  return status?.isFile() && status.size <= size ? status.size : 0;
}

/**
 * Fetches `file` to `path`. What has arrived stays when it fails or is stopped, and the next call goes on from there.
 * @throws MmditxError `io`, `bad-file` when the content is wrong again and again; the signal's reason
 */
export async function fetchBlob(hub: Hub, file: HubFile, path: string, options: BlobOptions): Promise<void> {
  const partial = partialPath(path);
  for (let download = 1; ; download++) {
    if (await complete(hub, file, partial, options)) break;
    await rm(partial, { force: true }).catch((cause) => {
      throw ioError('write', partial, cause);
    });
    if (download === DOWNLOADS) {
      throw new MmditxError(
        'bad-file',
        `${quote(file.name)} of ${options.subject.repo} arrived damaged ${DOWNLOADS} times (its content does not have the hash ${file.hash}); try another network or try again later.`,
      );
    }
    hub.onNote?.(`${quote(file.name)} arrived damaged; fetching it once more.`);
  }
  await rename(partial, path).catch(async (cause) => {
    // Another run was faster.
    if (!(await isComplete(path, file.size))) throw ioError('write', path, cause);
  });
}

/** Fetches what the file at `partial` lacks; whether its content is the right one then. */
async function complete(hub: Hub, file: HubFile, partial: string, { url, subject, onPosition }: BlobOptions) {
  const attempt = <T>(operation: Promise<T>): Promise<T> =>
    operation.catch((cause) => {
      throw ioError('write', partial, cause);
    });
  const handle = await attempt(open(partial, constants.O_RDWR | constants.O_CREAT, 0o666));
  try {
    const hash = contentHash(file);
    if ((await attempt(handle.stat())).size > file.size) await attempt(handle.truncate(0));
    let position = 0;
    for await (const bytes of existing(handle, partial, file.size)) {
      hub.signal?.throwIfAborted();
      hash.update(bytes);
      position += bytes.length;
    }
    onPosition?.(position);
    const receive = async (response: Response, alive: () => void) => {
      let skip = position - startOf(response, position, file, subject);
      for await (const chunk of response.body ?? []) {
        alive();
        const fresh = chunk.subarray(Math.min(skip, chunk.length));
        skip -= chunk.length - fresh.length;
        // Bytes beyond the file's size are not taken.
        const bytes = fresh.subarray(0, file.size - position);
        await attempt(writeAt(handle, bytes, position));
        hash.update(bytes);
        position += bytes.length;
        onPosition?.(position);
        if (fresh.length > bytes.length) break;
      }
      if (position < file.size) throw broken(hub, `it broke off after ${position} of ${file.size} bytes`);
    };
    const fetchRest = async () => {
      if (position === file.size) return;
      const headers: Record<string, string> = position > 0 ? { Range: `bytes=${position}-` } : {};
      await ask(hub, { url, headers }, subject, receive);
    };
    await persist(hub, fetchRest, () => position);
    await attempt(handle.sync());
    return hash.digest('hex') === file.hash;
  } finally {
    await handle.close();
  }
}

/** Git puts the kind and the size of a content before it. */
function contentHash({ hash, size }: HubFile): Hash {
  return hash.length === 64 ? createHash('sha256') : createHash('sha1').update(`blob ${size}\0`);
}

/** What an earlier run has left, at most `size` bytes. A piece is gone when the next one is asked for. */
async function* existing(handle: FileHandle, path: string, size: number): AsyncGenerator<Uint8Array> {
  const buffer = new Uint8Array(Math.min(READ_BYTES, size));
  for (let position = 0; position < size; ) {
    const length = Math.min(buffer.length, size - position);
    const { bytesRead } = await handle.read(buffer, 0, length, position).catch((cause) => {
      throw ioError('read', path, cause);
    });
    if (bytesRead === 0) return;
    yield buffer.subarray(0, bytesRead);
    position += bytesRead;
  }
}

/** One system call may write less than it was given. */
async function writeAt(handle: FileHandle, bytes: Uint8Array, position: number): Promise<void> {
  for (let written = 0; written < bytes.length; ) {
    written += (await handle.write(bytes, written, bytes.length - written, position + written)).bytesWritten;
  }
}

/**
 * The position in the file that an answer begins at: the one asked for, or 0 from servers that know no ranges.
 * @throws PassingFailure for another position, MmditxError `bad-file` for another size than the listing's
 */
function startOf(response: Response, position: number, { name, size }: HubFile, { repo }: Subject): number {
  const range = /^bytes (\d+)-\d+\/(\d+|\*)$/.exec(response.headers.get('Content-Range') ?? '');
  const ranged = response.status === 206;
  // The length of a compressed answer is not the file's.
  const plain = !response.headers.has('Content-Encoding');
  const length = ranged ? range?.[2] : plain && response.headers.get('Content-Length');
  if (length && length !== '*' && Number(length) !== size) {
    throw new MmditxError(
      'bad-file',
      `${quote(name)} of ${repo} has ${size} bytes in the listing and ${length} on the server; try again later.`,
    );
  }
  if (ranged && Number(range?.[1]) !== position) {
    throw new PassingFailure(
      `The server sent another piece of ${quote(name)} than the one asked for`,
      'try again later',
    );
  }
  return ranged ? position : 0;
}
