/** A data set on the disk: which pictures it has, and their captions. */
import { createHash } from 'node:crypto';
import { readdir, realpath, stat } from 'node:fs/promises';
import { basename, dirname, extname, isAbsolute, join, relative, resolve, sep } from 'node:path';
import { z } from 'zod';
import { MmditxError } from '../errors.ts';
import { ioError } from '../weights/atomic.node.ts';
import { isText, listOf } from '../weights/json.ts';
import { quote } from '../weights/quote.ts';
import { openPicture, readWhole } from './pictures.node.ts';

/** Most pictures of one data set, and most lines of its lists that may be wrong. */
const MAX_PICTURES = 2 ** 20;
const MAX_WRONG_LINES = 1000;

/** Largest list of pictures, and largest caption file, in bytes. */
const MAX_LIST_BYTES = 2 ** 28;
const MAX_CAPTION_BYTES = 2 ** 16;

/** Longest line of a metadata file, in characters. */
const MAX_ROW_LENGTH = 2 ** 16;

/** Files read at a time. */
const CONCURRENCY = 4;

const METADATA_FILE = 'metadata.jsonl';
const pictureEndings = ['.jpg', '.jpeg', '.png', '.webp', '.avif'];

/** Pictures people would miss if they were passed over in silence. */
const otherEndings = ['.gif', '.bmp', '.tif', '.tiff', '.heic', '.heif', '.jxl', '.svg', '.psd'];
const allEndings = [...pictureEndings, ...otherEndings];

export interface DatasetPicture {
  /** Absolute. */
  readonly path: string;
  /** Relative to the data set, with `/` between its parts; for messages. */
  readonly name: string;
  /** As shown: turned upright by the EXIF orientation. Pixels. */
  readonly width: number;
  readonly height: number;
  /** SHA-256 of the file's bytes, hexadecimal. */
  readonly digest: string;
  /** Alternatives; one empty text where there is no caption. */
  readonly captions: readonly string[];
}

export interface BrokenPicture {
  readonly name: string;
  /** What is wrong with it, as a clause such as `is not a picture`. */
  readonly reason: string;
}

export interface Dataset {
  /** Ordered by name, code unit by code unit. */
  readonly pictures: readonly DatasetPicture[];
  /** Files and lines that cannot be used, ordered likewise. */
  readonly broken: readonly BrokenPicture[];
}

export interface DatasetOptions {
  /**
   * A folder of pictures; or a `.jsonl` file, a line `{"file_name": ..., "text": ...}` for each picture; or a text file,
   * the path of a picture on each line. Paths in files are relative to the file and stay in its folder.
   */
  readonly path: string;
  /** Of the caption file beside a picture: `a.txt` or `a.jpg.txt` for `a.jpg`; default `.txt`. */
  readonly captionExtension?: string;
  /** Whether pictures in folders inside the folder belong to it; default true. */
  readonly recursive?: boolean;
}

export interface ReadDatasetOptions {
  readonly signal?: AbortSignal | undefined;
  /** Called after each file. */
  readonly onProgress?: ((progress: { readonly read: number; readonly total: number }) => void) | undefined;
}

/**
 * Finds the pictures of a data set (JPEG, PNG, WebP, AVIF) and their captions. Each line of a caption file is an
 * alternative; so are several rows with one `file_name`, and the texts of a row whose `text` is a list. A
 * `metadata.jsonl` in a folder comes before caption files there. `caption` is another name for `text`.
 *
 * Files are read and their headers looked at, but pictures are not decoded: `renderPicture` finds those that are
 * truncated. What cannot be used is listed, and does not stop the others.
 *
 * @throws MmditxError `io` when the path cannot be read, `bad-file` when it is no data set or none of its pictures can be
 *   used, `bad-option` for an impossible extension; the signal's reason
 */
export async function readDataset(
  { path, captionExtension = '.txt', recursive = true }: DatasetOptions,
  { signal, onProgress }: ReadDatasetOptions = {},
): Promise<Dataset> {
  const extension = checkedExtension(captionExtension);
  const { folder, entries, broken } = await findPictures(path, recursive, signal);
  const total = entries.size;
  const pictures: DatasetPicture[] = [];
  let read = 0;
  await inTurns([...entries], async ([name, listed]) => {
    signal?.throwIfAborted();
    const picture = await readEntry(folder, name, listed, extension);
    if ('reason' in picture) broken.push(picture);
    else pictures.push(picture);
    onProgress?.({ read: ++read, total });
  });
  pictures.sort(byName);
  broken.sort(byName);
  if (pictures.length === 0) throw noPictures(path, broken);
  return { pictures, broken };
}

async function readEntry(
  folder: string,
  name: string,
  listed: readonly string[],
  extension: string,
): Promise<DatasetPicture | BrokenPicture> {
  const path = join(folder, ...name.split('/'));
  if (otherEndings.includes(extname(name).toLowerCase())) {
    return { name, reason: `is a ${extname(name)} file, not JPEG, PNG, WebP or AVIF` };
  }
  const opened = await openPicture(path);
  if ('reason' in opened) return { name, reason: opened.reason };
  const { width, height, bytes } = opened;
  const captions = listed.length > 0 ? listed : await readCaptions(path, extension);
  if ('reason' in captions) return { name, reason: captions.reason };
  return { path, name, width, height, digest: createHash('sha256').update(bytes).digest('hex'), captions };
}

/** The lines of a picture's caption file. */
async function readCaptions(path: string, extension: string): Promise<readonly string[] | { reason: string }> {
  const stem = path.slice(0, path.length - extname(path).length);
  for (const file of [stem + extension, path + extension]) {
    const text = await readText(file, MAX_CAPTION_BYTES);
    if (typeof text === 'string') return linesOf(text);
    if (text.reason !== 'is missing') return { reason: `has a caption file that ${text.reason}` };
  }
  return [''];
}

/** A caption for each line that has text, or one empty caption. */
function linesOf(text: string): string[] {
  const lines = text
    .split('\n')
    .map((line) => line.trim())
    .filter((line) => line !== '');
  return lines.length > 0 ? lines : [''];
}

interface Found {
  /** The folder that paths are relative to. */
  readonly folder: string;
  /** Names of pictures, with the captions listed for them; none where they lie beside the picture. */
  readonly entries: Map<string, string[]>;
  readonly broken: BrokenPicture[];
}

async function findPictures(path: string, recursive: boolean, signal: AbortSignal | undefined): Promise<Found> {
  const root = await stat(path).catch((cause) => {
    throw ioError('read', path, cause);
  });
  const ending = extname(path).toLowerCase();
  const folder = resolve(root.isDirectory() ? path : dirname(path));
  const found: Found = { folder, entries: new Map(), broken: [] };
  if (root.isDirectory()) {
    await walkFolder('', found, { recursive, signal, visited: new Set() });
    const metadata = join(path, METADATA_FILE);
    if (await stat(metadata).catch(() => undefined)) await readRows(metadata, found);
  } else if (ending === '.jsonl') {
    await readRows(path, found);
  } else if (allEndings.includes(ending)) {
    throw new MmditxError('bad-file', `${path} is one picture; give the folder of the data set.`);
  } else {
    await eachLine(path, found, (line) => addPath(line, [], found));
  }
  return found;
}

interface Walk {
  readonly recursive: boolean;
  readonly signal: AbortSignal | undefined;
  /** Real paths: folders behind links are entered once each. */
  readonly visited: Set<string>;
}

/** Adds the pictures of a folder, without hidden files. */
async function walkFolder(inside: string, found: Found, walk: Walk): Promise<void> {
  walk.signal?.throwIfAborted();
  const path = join(found.folder, inside);
  const real = await realpath(path).catch(() => path);
  if (walk.visited.has(real)) return;
  walk.visited.add(real);
  const items = await readdir(path, { withFileTypes: true }).catch((cause) => {
    if (inside === '') throw ioError('read', path, cause);
    found.broken.push({ name: `${inside}/`, reason: `cannot be read (${cause.code})` });
    return [];
  });
  for (const item of items) {
    if (item.name.startsWith('.')) continue;
    const name = inside === '' ? item.name : `${inside}/${item.name}`;
    const target = item.isSymbolicLink() ? await stat(join(path, item.name)).catch(() => item) : item;
    if (target.isDirectory()) {
      if (walk.recursive) await walkFolder(name, found, walk);
    } else if (allEndings.includes(extname(name).toLowerCase())) {
      addEntry(name, [], found);
    }
  }
}

/** A row of a metadata file; other fields are allowed. */
const texts = z.union([z.string(), listOf(isText)]).nullish();
const row = z.object({ file_name: z.string(), text: texts, caption: texts });

async function readRows(path: string, found: Found): Promise<void> {
  await eachLine(path, found, (line) => {
    if (line.length > MAX_ROW_LENGTH) return `is longer than ${MAX_ROW_LENGTH} characters`;
    const parsed = row.safeParse(jsonOf(line));
    if (!parsed.success) return 'is not JSON with a file_name and a text';
    const { file_name, text, caption } = parsed.data;
    return addPath(file_name, [text ?? caption ?? []].flat().flatMap(linesOf), found);
  });
}

function jsonOf(line: string): unknown {
  try {
    return JSON.parse(line);
  } catch {
    return undefined;
  }
}

/** Adds the picture at a path that a file from outside names; returns what is wrong with the path. */
function addPath(path: string, captions: readonly string[], found: Found): string | undefined {
  const inside = relative(found.folder, resolve(found.folder, path));
  const outside = isAbsolute(path) || isAbsolute(inside) || inside === '..' || inside.startsWith(`..${sep}`);
  if (outside || inside === '') return `names ${quote(path)}, which does not lie in the folder of the data set`;
  addEntry(inside.split(sep).join('/'), captions, found);
  return undefined;
}

function addEntry(name: string, captions: readonly string[], { entries, folder }: Found): void {
  const known = entries.get(name);
  if (known) known.push(...captions);
  else entries.set(name, [...captions]);
  if (entries.size > MAX_PICTURES) {
    throw new MmditxError('bad-file', `${folder} has more than ${MAX_PICTURES} pictures; split the data set.`);
  }
}

/** Calls `use` with each line that is not empty; what it returns is noted as the line's fault. */
async function eachLine(path: string, { broken }: Found, use: (line: string) => string | undefined): Promise<void> {
  const text = await readText(path, MAX_LIST_BYTES);
  if (typeof text !== 'string') {
    throw new MmditxError('bad-file', `${path} ${text.reason}; give a folder, a .jsonl file or a list of pictures.`);
  }
  let wrong = 0;
  let number = 0;
  for (let start = 0, end = 0; start < text.length; start = end + 1) {
    end = text.indexOf('\n', start);
    if (end < 0) end = text.length;
    number++;
    const line = text.slice(start, end).trim();
    const fault = line === '' ? undefined : use(line);
    if (fault === undefined) continue;
    broken.push({ name: `${basename(path)}, line ${number}`, reason: fault });
    if (++wrong > MAX_WRONG_LINES) {
      throw new MmditxError(
        'bad-file',
        `${path} has more than ${MAX_WRONG_LINES} wrong lines: line ${number} ${fault}.`,
      );
    }
  }
}

async function readText(path: string, maxBytes: number): Promise<string | { reason: string }> {
  const bytes = await readWhole(path, maxBytes);
  if ('reason' in bytes) return bytes;
  try {
    const text = new TextDecoder('utf-8', { fatal: true }).decode(bytes);
    return text.includes('\0') ? { reason: 'is not a text' } : text;
  } catch {
    return { reason: 'is not a text in UTF-8' };
  }
}

function checkedExtension(extension: string): string {
  const name = extension.replace(/^\./, '');
  if (name === '' || /[/\\\0]/.test(name)) {
    throw new MmditxError('bad-option', `The caption extension ${quote(extension)} is none; give one such as .txt.`);
  }
  return `.${name}`;
}

function noPictures(path: string, broken: readonly BrokenPicture[]): MmditxError {
  const [first] = broken;
  if (!first) {
    return new MmditxError('bad-file', `${path} has no pictures; give a folder of JPEG, PNG, WebP or AVIF files.`);
  }
  const others = broken.length > 1 ? `, and ${broken.length - 1} more cannot be used` : '';
  return new MmditxError(
    'bad-file',
    `${path} has no picture that can be used: ${quote(first.name)} ${first.reason}${others}; give JPEG, PNG, WebP or AVIF files.`,
  );
}

/** Calls `work` with all items, a few at a time; the first error ends it. */
async function inTurns<T>(items: readonly T[], work: (item: T) => Promise<void>): Promise<void> {
  let next = 0;
  const worker = async () => {
    while (next < items.length) await work(items[next++]!);
  };
  await Promise.all(Array.from({ length: CONCURRENCY }, worker)).catch((error) => {
    next = items.length;
    throw error;
  });
}

function byName(a: { readonly name: string }, b: { readonly name: string }): number {
  return compare(a.name, b.name);
}

/** By code units: the same on every machine, whatever its language. */
function compare(a: string, b: string): number {
  return a < b ? -1 : a > b ? 1 : 0;
}
