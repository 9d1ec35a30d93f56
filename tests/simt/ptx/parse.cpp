// PTX as text to kernels: one pass, a line or a statement at a time, as nvcc writes it.
#include <ctype.h>
#include <stdlib.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "lanes.h"

namespace pse {
namespace ptx {

void fail(const std::string& what) { throw std::runtime_error(what); }

namespace {

using Words = std::vector<std::string>;

Words words_of(const std::string& text) {
    Words words;
    for (size_t i = 0; i < text.size();) {
        const size_t end = text.find_first_of(" \t\n,", i);
        if (end != i) words.push_back(text.substr(i, end - i));
        if (end == std::string::npos) break;
        i = end + 1;
    }
    return words;
}
std::string trimmed(const std::string& text) {
    const size_t first = text.find_first_not_of(" \t\n"), last = text.find_last_not_of(" \t\n");
    return first == std::string::npos ? "" : text.substr(first, last - first + 1);
}

struct Variable {
    std::string name;
    int64_t alignment, size;
    bool open;             // extern: as much as the launch says
    uint64_t address = 0;  // of a table in global memory
};
// ".shared .align 16 .b8 name[64]", ".param .u64 name" and the like.
Variable variable(const std::string& text) {
    Variable v = {"", 0, 0, text.find("[]") != std::string::npos, 0};
    int64_t element = 0;
    const Words words = words_of(text);
    for (size_t i = 0; i < words.size(); ++i) {
        const std::string& word = words[i];
        if (word == ".align")
            v.alignment = atoll(words[++i].c_str());
        else if (word == ".extern" || word == ".shared" || word == ".param" || word == ".visible" || word == ".global")
            continue;
        else if (word[0] == '.')
            element = atoll(word.c_str() + 2) / 8;  // .b8, .u64, .f32
        else
            v.name = word.substr(0, word.find('[')),
            v.size = element * (word.find('[') == std::string::npos ? 1 : atoll(word.c_str() + word.find('[') + 1));
    }
    if (element == 0) fail("PTX not understood: " + text);
    if (v.alignment == 0) v.alignment = element;
    return v;
}
int64_t placed(int64_t& end, const Variable& v) {
    const int64_t at = (end + v.alignment - 1) / v.alignment * v.alignment;
    end = at + v.size;
    return at;
}

// ".global .align 8 .b8 name[3] = {1, 2, 3}": its address, for as long as the process lives.
uint64_t constant_table(const std::string& text, const Variable& v) {
    static std::vector<std::vector<uint64_t>> kept;
    const size_t values = text.find('=');
    if (values == std::string::npos || text.find(".b8 ") == std::string::npos) fail("PTX not understood: " + text);
    kept.emplace_back(size_t(v.size) / 8 + 1);
    char* byte = reinterpret_cast<char*>(kept.back().data());
    for (const std::string& word : words_of(text.substr(values + 1)))
        for (const char* digits = word.c_str(); *digits != 0; ++digits)
            if (isdigit(*digits) && (digits == word.c_str() || !isdigit(digits[-1]))) *byte++ = char(atoi(digits));
    if (byte - reinterpret_cast<char*>(kept.back().data()) != v.size) fail("PTX not understood: " + text);
    return uint64_t(kept.back().data());
}

class Body {  // of a kernel, while it is read
  public:
    Body(Kernel& kernel, const std::map<std::string, Variable>& of_file) : kernel_(kernel), of_file_(of_file) {}

    void add_parameter(const std::string& text) {
        const Variable v = variable(text);
        const int64_t offset = placed(kernel_.parameter_bytes, v);
        symbols_[v.name] = {0, Source::parameter, uint64_t(offset)};
        kernel_.parameters.push_back({offset, v.size});
    }
    void add_shared(const Variable& v) {
        symbols_[v.name] = v.open ? Preset{0, Source::dynamic_shared, 0}
                                  : Preset{0, Source::shared, uint64_t(placed(kernel_.shared_bytes, v))};
    }
    void add_shared(const std::string& text) { add_shared(variable(text)); }
    void add_label(const std::string& name) { labels_[name] = int(kernel_.code.size()); }

    // "@%p1 ld.global.u32 %r1, [%rd1+8]"
    void add(const std::string& text) {
        Instruction in;
        in.text = text;
        size_t at = 0;
        if (text[0] == '@') {
            in.guard_negated = text[1] == '!';
            at = text.find_first_of(" \t");
            const size_t name = in.guard_negated ? 2 : 1;
            in.guard = operand(text.substr(name, at - name));
            at = text.find_first_not_of(" \t", at);
        }
        const size_t end = text.find_first_of(" \t", at);
        const std::string opcode = text.substr(at, end == std::string::npos ? end : end - at);
        if (opcode.compare(0, 3, "bra") == 0) {
            jumps_.push_back({int(kernel_.code.size()), trimmed(text.substr(end))});
        } else if (end != std::string::npos) {
            add_operands(in, text.substr(end));
        }
        decode(opcode, in);
        kernel_.code.push_back(std::move(in));
    }
    void finish() {
        const Instruction* last = kernel_.code.empty() ? nullptr : &kernel_.code.back();
        if (last == nullptr || last->guard >= 0 || (last->control != Control::exit && last->control != Control::branch))
            fail(kernel_.name + " has no end");
        for (const auto& jump : jumps_) {
            if (labels_.count(jump.second) == 0) fail("no label " + jump.second);
            kernel_.code[size_t(jump.first)].target = labels_[jump.second];
        }
    }

  private:
    void add_operands(Instruction& in, const std::string& text) {
        std::string name;
        const auto flush = [&] {
            if (name.empty()) return;
            const size_t plus = name.find('+');
            in.offsets.push_back(plus == std::string::npos ? 0 : atoll(name.c_str() + plus + 1));
            in.operands.push_back(operand(name.substr(0, plus)));
            name.clear();
        };
        bool address = false;
        for (const char c : text) {
            if (c == '+' && !address) fail("an offset outside of an address: " + in.text);
            if (isspace(c) || c == ',' || c == '{' || c == '}' || c == '[' || c == ']' || c == '|')
                flush();
            else
                name += c;
            if (c == '[' || c == ']') address = c == '[';
        }
        flush();
    }

    int operand(const std::string& name) {
        static const std::map<std::string, Source> special = {
            {"%tid.x", Source::thread},    {"%ntid.x", Source::threads},       {"%ctaid.x", Source::block},
            {"%nctaid.x", Source::blocks}, {"%cluster_ctarank", Source::rank}, {"%cluster_nctarank", Source::size}};
        const auto known = registers_.find(name);
        if (known != registers_.end()) return known->second;
        const int r = kernel_.registers++;
        registers_[name] = r;
        Preset preset = {r, Source::constant, 0};
        if (isdigit(name[0]) || name[0] == '-') {
            const bool real = name[0] == '0' && (name[1] == 'f' || name[1] == 'd');
            char* end = nullptr;
            preset.value = real             ? strtoull(name.c_str() + 2, &end, 16)
                           : name[0] == '-' ? uint64_t(strtoll(name.c_str(), &end, 0))
                                            : strtoull(name.c_str(), &end, 0);
            if (*end != 0) fail("a number not understood: " + name);
        } else if (name[0] != '%') {
            if (symbols_.count(name) == 0) {
                if (of_file_.count(name) == 0) fail("no symbol " + name);
                const Variable& v = of_file_.at(name);
                if (v.address != 0)
                    symbols_[name] = {0, Source::constant, v.address};
                else
                    add_shared(v);
            }
            preset = symbols_[name];
            preset.at = r;
        } else if (special.count(name) != 0) {
            preset.source = special.at(name);
        } else {
            const size_t digits = name.find_first_of("0123456789");
            const bool plain =
                digits != std::string::npos && name.find_first_not_of("0123456789", digits) == std::string::npos;
            static const std::string kinds[] = {"%p", "%rs", "%r", "%rd", "%f", "%fd"};
            if (name != "%tmp" &&
                (!plain || std::count(std::begin(kinds), std::end(kinds), name.substr(0, digits)) == 0))
                fail("the special register " + name + " is not known to tests/simt/ptx/parse.cpp");
            return r;
        }
        kernel_.presets.push_back(preset);
        return r;
    }

    Kernel& kernel_;
    const std::map<std::string, Variable>& of_file_;  // shared memory and tables that several kernels name
    std::map<std::string, Preset> symbols_;
    std::map<std::string, int> registers_, labels_;
    std::vector<std::pair<int, std::string>> jumps_;
};

std::string without_comments(const std::string& text) {
    std::string kept;
    kept.reserve(text.size());
    for (size_t i = 0; i < text.size();) {
        if (text.compare(i, 2, "//") == 0)
            i = std::min(text.find('\n', i), text.size());
        else
            kept += text[i++];
    }
    return kept;
}

}  // namespace

std::map<std::string, Kernel> parse(const std::string& source) {
    const std::string text = without_comments(source);
    std::map<std::string, Kernel> kernels;
    std::map<std::string, Variable> of_file;
    size_t i = 0;
    const auto until = [&](const char* ends) {  // what comes before one of `ends`, which is passed over
        const size_t end = text.find_first_of(ends, i);
        if (end == std::string::npos) fail("PTX ends early");
        const std::string before = trimmed(text.substr(i, end - i));
        i = end + 1;
        return before;
    };
    for (;;) {
        i = text.find_first_not_of(" \t\n", i);
        if (i == std::string::npos) break;
        if (text.compare(i, 8, ".version") == 0 || text.compare(i, 7, ".target") == 0 ||
            text.compare(i, 13, ".address_size") == 0) {
            until("\n");
            continue;
        }
        const bool entry = text.compare(i, 6, ".entry") == 0 || text.compare(i, 15, ".visible .entry") == 0;
        if (!entry) {
            const std::string declared = until(";");
            Variable v = variable(declared.substr(0, declared.find('=')));
            if (declared.compare(0, 7, ".global") == 0)
                v.address = constant_table(declared, v);
            else if (declared.find(".shared") == std::string::npos)
                fail("PTX not understood: " + declared);
            of_file[v.name] = v;
            continue;
        }
        const std::string name = words_of(until("(")).back();
        Kernel& kernel = kernels[name];
        kernel.name = name;
        Body body(kernel, of_file);
        const std::string parameters = until(")");
        for (size_t at = 0; at < parameters.size();) {
            const size_t end = std::min(parameters.find(',', at), parameters.size());
            body.add_parameter(parameters.substr(at, end - at));
            at = end + 1;
        }
        const std::string directives = until("{");
        const size_t most = directives.find(".maxntid");
        for (const char* other : {".reqntid", ".reqnctapercluster", ".explicitcluster"})
            if (directives.find(other) != std::string::npos) fail("PTX not understood: " + directives);
        if (most != std::string::npos) kernel.most_threads = atoi(directives.c_str() + most + 8);
        // Braces of a scope stand alone; those of vectors are within a statement.
        for (int depth = 1; depth > 0;) {
            i = text.find_first_not_of(" \t\n", i);
            if (i == std::string::npos) fail("PTX ends early");
            if (text[i] == '{' || text[i] == '}') {
                depth += text[i] == '{' ? 1 : -1;
                ++i;
                continue;
            }
            if (text[i] == '$') {
                body.add_label(until(":"));
                continue;
            }
            const std::string statement = until(";");
            if (statement.compare(0, 7, ".shared") == 0)
                body.add_shared(statement);
            else if (statement.compare(0, 4, ".reg") != 0 && statement.compare(0, 7, ".pragma") != 0)
                body.add(statement);
        }
        body.finish();
    }
    return kernels;
}

}  // namespace ptx
}  // namespace pse
