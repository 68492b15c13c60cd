/* Compiles many HLSL files with one of Microsoft's compilers in one process, under Windows or Wine.
 *
 *     hlsl_compile.exe dxc|fxc LIST
 *
 * LIST has a line for each file: its path, a tab, its entry point. For each, one line on standard output: "ok" or "no",
 * a tab, the path; the compiler's words go before a "no", each line after "| ". dxcompiler.dll (with dxil.dll, if there
 * is one) or d3dcompiler_47.dll has to lie beside the program.
 *
 * The interfaces are declared here as far as they are called: COM objects are tables of functions, in a fixed order.
 */
#include <windows.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct Blob Blob;
struct Blob {
    struct {
        HRESULT(WINAPI *query)(Blob *, REFIID, void **);
        ULONG(WINAPI *retain)(Blob *);
        ULONG(WINAPI *release)(Blob *);
        void *(WINAPI *bytes)(Blob *);
        SIZE_T(WINAPI *size)(Blob *);
    } const *calls;
};

typedef struct Result Result;
struct Result {
    struct {
        HRESULT(WINAPI *query)(Result *, REFIID, void **);
        ULONG(WINAPI *retain)(Result *);
        ULONG(WINAPI *release)(Result *);
        HRESULT(WINAPI *status)(Result *, HRESULT *);
        HRESULT(WINAPI *object)(Result *, Blob **);
        HRESULT(WINAPI *errors)(Result *, Blob **);
    } const *calls;
};

typedef struct {
    const void *bytes;
    SIZE_T size;
    UINT encoding;
} Text;

typedef struct Dxc Dxc;
struct Dxc {
    struct {
        HRESULT(WINAPI *query)(Dxc *, REFIID, void **);
        ULONG(WINAPI *retain)(Dxc *);
        ULONG(WINAPI *release)(Dxc *);
        HRESULT(WINAPI *compile)(Dxc *, const Text *, LPCWSTR *, UINT32, void *, REFIID, void **);
    } const *calls;
};

/* DxcCompiler, IDxcCompiler3, IDxcResult */
static const GUID DXC_CLASS = {0x73e22d93, 0xe6ce, 0x47f3, {0xb5, 0xbf, 0xf0, 0x66, 0x4f, 0x39, 0xc1, 0xb0}};
static const GUID DXC_COMPILER = {0x228b4687, 0x5a6a, 0x4730, {0x90, 0x0c, 0x97, 0x02, 0xb2, 0x20, 0x3f, 0x54}};
static const GUID DXC_RESULT = {0x58346cda, 0xdde7, 0x4497, {0x94, 0x61, 0x6f, 0x87, 0xaf, 0x5e, 0x06, 0x59}};

typedef HRESULT(WINAPI *CreateDxc)(REFIID, REFIID, void **);
typedef HRESULT(WINAPI *CompileFxc)(const void *, SIZE_T, const char *, const void *, void *, const char *, const char *,
                                    UINT, UINT, Blob **, Blob **);

static const UINT FXC_ENABLE_STRICTNESS = 1 << 11;

static CompileFxc fxc;
static Dxc *dxc;

static char *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    if (!file) return NULL;
    fseek(file, 0, SEEK_END);
    long length = ftell(file);
    rewind(file);
    char *text = length < 0 ? NULL : malloc((size_t)length + 1);
    if (text) {
        *size = fread(text, 1, (size_t)length, file);
        text[*size] = 0;
    }
    fclose(file);
    return text;
}

static void say(Blob *words) {
    if (!words) return;
    const char *text = words->calls->bytes(words), *end = text + words->calls->size(words);
    while (text < end && *text) {
        const char *stop = text;
        while (stop < end && *stop && *stop != '\n') stop++;
        printf("| %.*s\n", (int)(stop - text), text);
        text = stop + 1;
    }
    words->calls->release(words);
}

static int with_fxc(const char *path, const char *entry, const char *text, size_t size) {
    Blob *code = NULL, *words = NULL;
    /* As wgpu calls it. */
    HRESULT failed = fxc(text, size, path, NULL, NULL, entry, "cs_5_1", FXC_ENABLE_STRICTNESS, 0, &code, &words);
    if (FAILED(failed)) say(words);
    if (code) code->calls->release(code);
    return SUCCEEDED(failed);
}

static int with_dxc(const char *entry, const char *text, size_t size) {
    WCHAR name[256];
    MultiByteToWideChar(CP_UTF8, 0, entry, -1, name, 256);
    /* As wgpu calls it, but for optimisation, which changes nothing about what is accepted. */
    LPCWSTR arguments[] = {L"-E", name, L"-T", L"cs_6_2", L"-HV", L"2018", L"-enable-16bit-types", L"-Od"};
    Text source = {text, size, CP_UTF8};
    Result *result = NULL;
    if (FAILED(dxc->calls->compile(dxc, &source, arguments, 8, NULL, &DXC_RESULT, (void **)&result))) return 0;
    HRESULT status = E_FAIL;
    Blob *words = NULL;
    result->calls->status(result, &status);
    if (FAILED(status) && SUCCEEDED(result->calls->errors(result, &words))) say(words);
    result->calls->release(result);
    return SUCCEEDED(status);
}

static int load(const char *which) {
    if (!strcmp(which, "fxc")) {
        HMODULE library = LoadLibraryA("d3dcompiler_47.dll");
        fxc = library ? (CompileFxc)(void *)GetProcAddress(library, "D3DCompile") : NULL;
        return fxc != NULL;
    }
    HMODULE library = LoadLibraryA("dxcompiler.dll");
    CreateDxc create = library ? (CreateDxc)(void *)GetProcAddress(library, "DxcCreateInstance") : NULL;
    return create && SUCCEEDED(create(&DXC_CLASS, &DXC_COMPILER, (void **)&dxc));
}

int main(int count, char **arguments) {
    if (count != 3 || !load(arguments[1])) {
        fprintf(stderr, "hlsl_compile: dxc|fxc LIST, with the compiler's library beside this program\n");
        return 2;
    }
    size_t length = 0;
    char *list = read_file(arguments[2], &length);
    if (!list) return 2;
    for (char *line = strtok(list, "\r\n"); line; line = strtok(NULL, "\r\n")) {
        char *entry = strchr(line, '\t');
        if (!entry) return 2;
        *entry++ = 0;
        size_t size = 0;
        char *text = read_file(line, &size);
        int good = text && (fxc ? with_fxc(line, entry, text, size) : with_dxc(entry, text, size));
        printf("%s\t%s\n", good ? "ok" : "no", line);
        fflush(stdout);
        free(text);
    }
    return 0;
}
