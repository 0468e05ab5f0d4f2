/** Where the recipe keeps what it makes on the way. */

import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

export const FOLDER = dirname(fileURLToPath(import.meta.url));
/** Rendered pictures, latents and training states: all of it can be made again. */
export const CACHE = join(FOLDER, '.cache');
/** The finished model. */
export const MODEL_FILE = join(FOLDER, 'mmditx-small.safetensors');
