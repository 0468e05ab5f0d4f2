/** Weight files on disk. */
import { open, realpath, stat } from 'node:fs/promises';
import { MmditxError } from '../errors.ts';
import type { TensorData } from '../tensor/data.ts';
import { ioError, type WriteOptions, writeFileAtomically } from './atomic.node.ts';
import { type ByteSource, safetensorsChunks } from './safetensors.ts';

export interface FileSource extends ByteSource {
  readonly path: string;
  close(): Promise<void>;
}

/** Node refuses single reads of 2 GiB and more. */
const MAX_READ = 2 ** 30;

/**
 * Opens a file for reading; the caller closes it.
 * @throws MmditxError `io` when it cannot be opened or is not a file.
 */
export async function fileSource(path: string): Promise<FileSource> {
  const attempt = <T>(operation: Promise<T>): Promise<T> =>
    operation.catch((cause) => {
      throw ioError('read', path, cause);
    });

  const handle = await attempt(open(path, 'r'));
  const close = () => handle.close();
  const status = await handle.stat();
  if (!status.isFile()) {
    await close();
    if (status.isDirectory()) throw ioError('read', path, { code: 'EISDIR' });
    throw new MmditxError('io', `Cannot read ${path}: it is a device or a pipe; give the path of a file.`);
  }

  const read = async (offset: number, length: number): Promise<Uint8Array> => {
    const bytes = new Uint8Array(length);
    let filled = 0;
    while (filled < length) {
      const { bytesRead } = await attempt(
        handle.read(bytes, filled, Math.min(length - filled, MAX_READ), offset + filled),
      );
      if (bytesRead === 0) break;
      filled += bytesRead;
    }
    return bytes.subarray(0, filled);
  };
  const requireUnchanged = async () => {
    const now = await stat(path).catch(() => undefined);
    const same = now && now.size === status.size && now.mtimeMs === status.mtimeMs && now.ino === status.ino;
    if (same) return;
    const found = now ? 'was changed' : 'is gone';
    throw new MmditxError(
      'bad-file',
      `${path} ${found} since it was opened; load the model again once the file is complete.`,
    );
  };
  // Programs that map the file refuse links out of its folder, and caches of models are made of those.
  return { name: path, path: await attempt(realpath(path)), size: status.size, read, close, requireUnchanged };
}

/**
 * Writes a safetensors file, replacing an existing one only when the new one is complete.
 * @throws MmditxError `io` when it cannot be written.
 */
export async function writeSafetensorsFile(
  path: string,
  tensors: ReadonlyMap<string, TensorData>,
  metadata: Readonly<Record<string, string>> = {},
  options: WriteOptions = {},
): Promise<void> {
  await writeFileAtomically(path, safetensorsChunks(tensors, metadata), options);
}
